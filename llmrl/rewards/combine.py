"""From several rewards of one row to one."""

from __future__ import annotations

from collections.abc import Sequence


def weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """The sum of weight times value over the parts that apply; None when none does (TRL's nansum, without its 0 for no part).

    Example: weighted_sum([1.0, None, 0.5], [1.0, 5.0, 2.0]) -> 2.0
    """
    parts = [weight * value for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(parts) if parts else None
