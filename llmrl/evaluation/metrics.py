"""Accuracy with an interval, and pass@k, from counts of right answers a problem. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution
_UNSEEN = 0.1  # see accuracy_interval


def accuracy_interval(correct: Sequence[float], n: int | Sequence[int]) -> tuple[float, float, float]:
    """Mean over problems of the share of right completions, with the ends of its 95% interval: (accuracy, low, high), all in [0, 1].

    `correct[i]` of the `n` (or `n[i]`) completions of problem i are right. The interval is for the mean over all problems that the benchmark
    could have had, so it says how far another set of such problems would move the number, too. Answers to one problem are not independent:
    it is Wilson's (1927) at an effective sample size, p (1 - p) over the variance of the mean. The variance is taken between problems; it is
    at least that of independent answers, at most that of problems that are always or never solved, and 0.1 / m is added to it: of the few
    that a model solves in a set of hardly solvable problems, or fails in an easy one, a small set often shows none, and then the spread
    looks small just where the mean is far off. The quantile is Student's. The width is never 0. Coverage: benchmarks/RESULTS.md.

    Raises ValueError for no problem, fewer than one completion, or a count outside 0..n.
    """
    counts, samples = _checked(correct, n)
    shares = counts / samples
    p = float(shares.mean())
    variance = float(shares.var(ddof=1)) if len(shares) > 1 else 1.0
    return p, *interval_of(p, variance, len(shares), least=float((1 / samples).mean()))


def interval_of(p: float, variance: float, m: int, *, least: float) -> tuple[float, float]:
    """The ends of `accuracy_interval` for m problems whose shares have that mean and variance; at least p (1 - p) times `least` of it,
    which is 1 over the samples a problem."""
    spread = p * (1 - p)
    ratio = min(1.0, max(least, (variance + _UNSEEN / m) / spread)) if spread > 0 else 1.0
    size, z = m / ratio, student(m - 1)
    shrink = 1 + z * z / size
    centre = (p + z * z / (2 * size)) / shrink
    half = z / shrink * math.sqrt(spread / size + z * z / (4 * size * size))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding must not leave p outside


def student(freedom: int) -> float:
    """About the 97.5% quantile of Student's t: the first terms of its expansion about the normal's (Abramowitz and Stegun 26.7.5).

    Within 0.2% from 10 degrees of freedom; too small below 5, and taken at 1 for 0.
    """
    z, v = _Z95, max(freedom, 1)
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)


def _checked(correct: Sequence[float], n: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Right completions and completions, a problem each. Raises ValueError for counts that can't be."""
    counts = np.asarray(correct, dtype=np.float64)
    samples = (
        np.broadcast_to(np.asarray(n, dtype=np.float64), counts.shape)
        if np.ndim(n) == 0
        else np.asarray(n, dtype=np.float64)
    )
    if len(counts) == 0 or len(samples) != len(counts) or samples.min() < 1:
        raise ValueError(
            f"accuracy needs at least one problem and one completion each; got {len(counts)} problems, n={n}"
        )
    if counts.min() < 0 or (counts > samples).any():
        raise ValueError(f"a count of right completions lies outside 0..n: {counts.min():g} to {counts.max():g}, n={n}")
    return counts, samples


def mean_interval(rewards: Sequence[Sequence[float | None]]) -> tuple[float, float, float] | None:
    """Mean reward with the ends of its 95% interval, (mean, low, high), from the rewards of each problem's completions.

    Completions without a reward (None) stay out; None where no problem has one. Answers to one problem are not independent: the error is
    that of a ratio of sums over problems (Cochran 1977, section 6.3), which for equal counts is the spread of the problems' means. The
    quantile is Student's. One problem, or rewards that are all equal, tell nothing about the spread: the interval
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
    half = student(m - 1) * float(np.sqrt((residuals**2).sum() / (m - 1) / m))
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


def mean_pass_at_k(correct: Sequence[int], n: int | Sequence[int]) -> dict[int, float]:
    """pass@k averaged over problems, for k of `sample_sizes`; problems with fewer than k samples are left out of it.

    `correct[i]` of the `n` (or `n[i]`) samples of problem i are right.
    """
    counts, samples = _checked(correct, n)
    out = {}
    for k in sample_sizes([int(size) for size in samples]):
        values = [pass_at_k(int(size), int(c), k) for size, c in zip(samples, counts, strict=True) if size >= k]
        out[k] = sum(values) / len(values)
    return out
