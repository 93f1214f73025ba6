r"""`length` (equal, at_most, at_least or between a number of tokens) and `length_zscore` (against the others of the group).

In a recipe by its name, for it is built in: `rewards: [{function: length_zscore}]`.

>>> ids = [[7] * 100, [7] * 150]
>>> length(completion_ids=ids, target=100, kind="at_least"), length(completion_ids=ids, target=80, upper=150, kind="between")  # right
([0.0, 0.0], [0.0, 0.0])
>>> length(completion_ids=ids, target=100), length(completion_ids=ids, target=120, kind="at_least")[0] < 0  # wrong: too long, too short
([0.0, -0.5], True)
>>> length_zscore(prompts=["q"] * 2, completion_ids=ids)
[1.0, -1.0]
>>> length(completion_ids=[[]], target=100), length_zscore(prompts=["q"], completion_ids=[[]])  # empty
([-1.0], [0.0])
>>> length(completion_ids=[[7] * 1_000_000], target=1), length_zscore(prompts=["q"] * 99, completion_ids=[[7] * 9999] + [[7]] * 98)[0]  # hostile
([-1.0], -3.0)
"""

from llmrl.rewards.length import length, length_zscore

__all__ = ["length", "length_zscore"]
