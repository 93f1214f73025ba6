"""From several rewards of one row to one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Combination = Literal["sum", "product", "gated", "normalize_then_sum"]
Values = Sequence[float | None]
"""What the reward functions gave a row; None where one does not apply."""

EPS = 1e-4


def weighted_sum(values: Values, weights: Sequence[float]) -> float | None:
    """The sum of weight times value over the parts that apply; None when none does (TRL's nansum, without its 0 for no part).

    Example: weighted_sum([1.0, None, 0.5], [1.0, 5.0, 2.0]) -> 2.0
    """
    parts = [weight * value for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(parts) if parts else None


def weighted_product(values: Values, weights: Sequence[float]) -> float | None:
    """The product of weight times value over the parts that apply; None when none does.

    Example: weighted_product([1.0, None, 0.5], [1.0, 5.0, 2.0]) -> 1.0
    """
    parts = [weight * value for value, weight in zip(values, weights, strict=True) if value is not None]
    return math.prod(parts) if parts else None


def gated(values: Values, weights: Sequence[float], threshold: float) -> float | None:
    """The weighted sum where the first value is at least `threshold`, else the first's term alone; None when the first does not apply.

    Example: gated([0.0, 0.9], [1.0, 1.0], 0.5) -> 0.0
    """
    gate = values[0]
    if gate is None:
        return None
    return weighted_sum(values, weights) if gate >= threshold else weights[0] * gate


def standardized(values: Values) -> list[float | None]:
    """(value - mean) / (std + 1e-4) over those of a group that apply, with the sample std (n - 1), as TRL does; 0 where all are equal.

    Example: standardized([1.0, None, 0.0]) -> [0.70701, None, -0.70701]
    """
    known = [v for v in values if v is not None]
    if len(known) < 2 or min(known) == max(known):
        return [None if v is None else 0.0 for v in values]
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1))
    return [None if v is None else (v - mean) / (std + EPS) for v in values]


def combine_group(
    rows: Sequence[Values], weights: Sequence[float], how: Combination = "sum", threshold: float = 0.5
) -> list[float | None]:
    """The reward of each row of a group: `rows` are the completions of one prompt, with a value for each of the `weights`.

    normalize_then_sum standardises each function's values over the group first, so that none drowns the others (GDPO,
    arXiv 2601.05242).
    """
    if how == "gated":
        return [gated(row, weights, threshold) for row in rows]
    if how == "product":
        return [weighted_product(row, weights) for row in rows]
    if how == "normalize_then_sum" and rows:
        rows = list(zip(*(standardized(column) for column in zip(*rows, strict=True)), strict=True))
    return [weighted_sum(row, weights) for row in rows]
