r"""The share of the letters that are of the language's script.

In a recipe by its name, for it is built in: `rewards: [{function: language_consistency}]`.

>>> language_consistency(completions=["two and two is 4"], language="en"), language_consistency(completions=["二加二"], language="zh")  # right
([1.0], [1.0])
>>> language_consistency(completions=["abc где"], language="en")  # wrong: half of it
[0.5]
>>> language_consistency(completions=["", "123 !"], language="en")  # empty
[0.0, 0.0]
>>> language_consistency(completions=["а" * 1_000_000, "\ud800" * 9], language="en")  # hostile: Cyrillic letters that look Latin
[0.0, 0.0]
"""

from llmrl.rewards.language import language_consistency

__all__ = ["language_consistency"]
