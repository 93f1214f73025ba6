"""Two models on the same problems: the difference with an interval, and how likely one as large is without any. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llmrl.evaluation.metrics import student

_FLIPS, _MOST_STEPS, _SEED = 100_000, 1_000_000, 0
_UNSEEN = 0.2  # twice that of metrics.accuracy_interval: two models


def differences(
    a: Sequence[int], samples_a: Sequence[int], b: Sequence[int], samples_b: Sequence[int]
) -> tuple[np.ndarray, int]:
    """(whole numbers, their common denominator): share of right samples of B less that of A, a problem each.

    `a[i]` of the `samples_a[i]` samples of problem i are right, and so on. Raises ValueError for no problem and for impossible counts.
    """
    if not len(a) or not len(a) == len(samples_a) == len(b) == len(samples_b):
        raise ValueError("a paired comparison needs the counts of the same problems, at least one, of both")
    rows = list(zip(a, samples_a, b, samples_b, strict=True))
    for right_a, n_a, right_b, n_b in rows:
        if not (0 <= right_a <= n_a and 0 <= right_b <= n_b and n_a >= 1 and n_b >= 1):
            raise ValueError(f"impossible counts of right samples: {right_a} of {n_a}, {right_b} of {n_b}")
    whole = math.lcm(*samples_a, *samples_b)
    return np.array([rb * (whole // nb) - ra * (whole // na) for ra, na, rb, nb in rows], dtype=object), whole


def difference_interval(
    a: Sequence[int], samples_a: Sequence[int], b: Sequence[int], samples_b: Sequence[int]
) -> tuple[float, float, float]:
    """Mean over problems of B's share of right samples less A's, with the ends of its 95% interval: (difference, low, high) in [-1, 1].

    Paired: the spread is that of the problems' differences. As Bonett and Price (2012, J. Educational and Behavioral Statistics 37) do for
    one answer each, a problem that A alone solves and one that B alone solves are added, or two models that agree everywhere would differ
    by exactly nothing. With several samples they weigh less, as far as a sample less tells less; samples that all agree count as one. The
    quantile is Student's. Raises what `differences` does.
    """
    scaled, whole = differences(a, samples_a, b, samples_b)
    d = scaled.astype(np.float64) / whole
    m, mean = len(d), float(d.mean())
    agree = all(x in (0, n) for x, n in zip([*a, *b], [*samples_a, *samples_b], strict=True))
    added = 2.0 if agree else max(_UNSEEN, float(np.mean([1 / x + 1 / y for x, y in zip(samples_a, samples_b, strict=True)])))  # fmt: skip
    size = m + added
    centre = float(d.sum()) / size
    half = student(m - 1) * math.sqrt(((float((d * d).sum()) + added) / size - centre**2) / size)
    return mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))


def sign_flip_p_value(scaled: np.ndarray) -> tuple[float, bool]:
    """(two-sided p, whether it is exact) of the sum of differences, if each were as likely to have the other sign: no model is better.

    scaled: whole numbers, as `differences` gives. Of differences of 1 it is McNemar's exact test (the sign test). Exact by convolution
    where the sum can take at most a million values; else from 100,000 flips with a fixed seed, the observed one counted in.
    """
    steps = sorted(abs(int(x)) for x in scaled if x)
    divisor = math.gcd(*steps) or 1
    steps, observed = [x // divisor for x in steps], abs(int(sum(scaled))) // divisor
    total = sum(steps)
    if total > _MOST_STEPS:
        rng, sizes = np.random.default_rng(_SEED), np.array(steps, dtype=np.float64)
        least = observed * (1 - 1e-12)
        hits = sum(
            int((np.abs((2.0 * rng.integers(0, 2, (1000, len(sizes))) - 1) @ sizes) >= least).sum())
            for _ in range(_FLIPS // 1000)
        )
        return (hits + 1) / (_FLIPS + 1), False
    chance = np.zeros(total + 1)  # of the sum of the positive ones: the whole sum is twice that less the total
    chance[0] = 1.0
    reached = 0
    for step in steps:
        now = 0.5 * chance[: reached + step + 1]
        now[step:] += 0.5 * chance[: reached + 1]
        reached += step
        chance[: reached + 1] = now
    sums = np.abs(2 * np.arange(total + 1) - total)
    return min(1.0, float(chance[sums >= observed].sum())), True
