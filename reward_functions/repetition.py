"""Up to -1 for repeated 4-grams of words: a batch function in TRL's signature, with an argument that a recipe can set.

>>> repetition(["a b c d e f"])  # right: nothing repeats
[0.0]
>>> repetition(["a b c d a b c d"])  # wrong: one of five 4-grams repeats
[-0.2]
>>> repetition([""])  # empty
[0.0]
>>> repetition(["la " * 100_000])[0] < -0.99  # hostile
True
"""

from llmrl.rewards.base import completion_text
from llmrl.rewards.length import repetition_penalty


def repetition(completions, ngram_size: int = 4, **kwargs) -> list[float]:
    """The share of repeated n-grams, negated."""
    words = [completion_text(c).split() for c in completions]
    return [round(repetition_penalty.score(w, ngram_size=ngram_size), 6) for w in words]
