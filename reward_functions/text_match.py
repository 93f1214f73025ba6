r"""The answer against a reference text: `text_match` (the same words, or `within`) and `text_f1` (words in common).

In a recipe by its name, for it is built in: `rewards: [{function: text_match}]`.

>>> text_match(completions=["Answer: The Nile."], answer=["nile"]), text_f1(completions=["Answer: river Nile"], answer=["Nile river"])  # right
([1.0], [1.0])
>>> text_match(completions=["Answer: Amazon"], answer=["Nile"]), text_f1(completions=["the Nile in Egypt"], answer=["river Nile"])  # wrong
([0.0], [0.4])
>>> text_match(completions=["the old Nile delta"], answer=[["Amazon", "Nile"]], within=True)  # one of several, anywhere
[1.0]
>>> text_match(completions=[""], answer=["Nile"]), text_f1(completions=[""], answer=["Nile"])  # empty
([0.0], [0.0])
>>> text_match(completions=["nile " * 100_000], answer=["nile"]), text_f1(completions=["nile " * 100_000], answer=["nile"])[0] < 1e-4  # hostile
([0.0], True)
"""

from llmrl.rewards.text import text_f1, text_match

__all__ = ["text_f1", "text_match"]
