r"""Sentence BLEU and chrF to a reference translation, from 0 to 1. Needs a column `answer`, and `llmrl[graders]`.

In a recipe by its name, for it is built in: `rewards: [{function: bleu}]`.

>>> columns = {"answer": ["the cat sat on the mat"]}
>>> [round(f(completions=["the cat sat on the mat"], **columns)[0], 6) for f in (bleu, chrf)]  # right
[1.0, 1.0]
>>> [0 < f(completions=["a dog sat on the mat"], **columns)[0] < 0.8 for f in (bleu, chrf)]  # wrong
[True, True]
>>> [f(completions=[""], **columns) for f in (bleu, chrf)]  # empty
[[0.0], [0.0]]
>>> [f(completions=["the " * 20_000], **columns)[0] < 0.1 for f in (bleu, chrf)]  # hostile
[True, True]
"""

from llmrl.rewards.language import bleu, chrf

__all__ = ["bleu", "chrf"]
