"""A gentle push to short completions: 0 up to half of `limit` tokens, then down linearly to -1 at `limit` (DAPO's soft punishment).

In a recipe: `rewards: [{function: reward_functions/length.py:short, args: {limit: 200}, weight: 0.2}]`.

>>> short.score([7] * 80, limit=200)  # right: short enough
0.0
>>> short.score([7] * 150, limit=200)  # wrong: half-way into the punished part
-0.5
>>> short.score([], limit=200)  # empty
0.0
>>> short.score([7] * 1_000_000, limit=200)  # hostile
-1.0
"""

from llmrl.rewards import row_verifier
from llmrl.rewards.length import soft_overlong


@row_verifier(safe=True)
def short(completion_ids, *, limit: int) -> float:
    """The soft overlong punishment with a cache of half the limit."""
    return soft_overlong.score(completion_ids, max_completion_len=limit, soft_punish_cache=limit // 2)
