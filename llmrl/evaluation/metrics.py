"""Accuracy with an interval, and pass@k, from counts of right answers a problem. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution


def accuracy_interval(correct: Sequence[float], n: int) -> tuple[float, float, float]:
    """Mean accuracy over problems, with the ends of its 95% interval: (accuracy, low, high), all in [0, 1].

    `correct[i]` of the `n` completions of problem i are right. The n answers to one problem are not independent, so the
    interval is Wilson's (1927) at an effective sample size: p(1-p) over the variance of the mean, which is taken between problems
    (between m - 1, where every problem is always or never solved, and m * n, where problems don't differ). With 0 or all right
    nothing is known about the spread, and each problem counts as one answer: the width is never 0. With n > 1 the normal quantile is
    replaced by Student's at m - 1 degrees of freedom (first-order expansion).

    Raises ValueError for no problem, n < 1, or a count outside 0..n.
    """
    counts = np.asarray(correct, dtype=np.float64)
    m = len(counts)
    if m == 0 or n < 1:
        raise ValueError(f"accuracy needs at least one problem and one completion each; got {m} problems, n={n}")
    if counts.min() < 0 or counts.max() > n:
        raise ValueError(f"a count of right completions lies outside 0..{n}: {counts.min():g} to {counts.max():g}")
    p = float(counts.mean() / n)
    spread = p * (1 - p)
    between = float((counts / n).var(ddof=1)) if m > 1 else spread
    if spread == 0 or n == 1:
        size = float(m)
    else:
        size = min(spread * m / between, m * n) if between > 0 else float(m * n)
    z = _Z95 * (1 + (_Z95**2 + 1) / (4 * max(m - 1, 1))) if n > 1 else _Z95
    shrink = 1 + z * z / size
    centre = (p + z * z / (2 * size)) / shrink
    half = z / shrink * math.sqrt(spread / size + z * z / (4 * size * size))
    return p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding must not leave p outside


def mean_interval(rewards: Sequence[Sequence[float | None]]) -> tuple[float, float, float] | None:
    """Mean reward with the ends of its 95% interval, (mean, low, high), from the rewards of each problem's completions.

    Completions without a reward (None) stay out; None where no problem has one. Answers to one problem are not independent: the error is
    that of a ratio of sums over problems (Cochran 1977, section 6.3), which for equal counts is the spread of the problems' means. The
    quantile is Student's (first-order expansion). One problem, or rewards that are all equal, tell nothing about the spread: the interval
    is all numbers.

    Example: mean_interval([[0.0, 2.0], [3.0]]) -> mean 5 / 3
    """
    kept = [[r for r in row if r is not None] for row in rewards]
    sums = np.array([(sum(row), len(row)) for row in kept if row], dtype=np.float64)
    if not len(sums):
        return None
    m, mean = len(sums), float(sums[:, 0].sum() / sums[:, 1].sum())
    if m == 1 or len({r for row in kept for r in row}) == 1:
        return mean, -math.inf, math.inf
    residuals = (sums[:, 0] - mean * sums[:, 1]) / sums[:, 1].mean()
    z = _Z95 * (1 + (_Z95**2 + 1) / (4 * (m - 1)))
    half = z * float(np.sqrt((residuals**2).sum() / (m - 1) / m))
    return mean, mean - half, mean + half


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of "at least one of k completions is right" from c right ones of n: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1. n=8, c=2, k=4 gives 0.785714. Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n; got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def sample_sizes(counts: Sequence[int]) -> list[int]:
    """The k that pass@k and maj@k are listed for: 1, 2, 4, ... and the largest number of samples a problem."""
    most = max(counts, default=0)
    return sorted({2**i for i in range(most.bit_length())} | {most}) if most else []


def mean_pass_at_k(correct: Sequence[int], n: int) -> dict[int, float]:
    """pass@k averaged over problems, for k = 1, 2, 4, ... and n itself."""
    return {k: sum(pass_at_k(n, int(c), k) for c in correct) / len(correct) for k in sample_sizes([n])}
