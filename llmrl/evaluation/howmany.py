"""How many samples, and how many problems, an accuracy needs to be known to a wanted margin. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrl.errors import ConfigError
from llmrl.evaluation.metrics import interval_of, student

SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DEFAULT_SHARE = 0.5
MOST_PROBLEMS = 10_000_000


@dataclass(frozen=True)
class Spread:
    """What is assumed of a model on a benchmark: its accuracy, and which share of p (1 - p), the variance of one answer, lies between
    problems. 0: all problems are as hard; 1: each is solved always or never, and a second sample tells nothing."""

    accuracy: float
    share: float

    def variance(self, samples: float) -> float:
        """Of the share of right samples of a problem."""
        whole = self.accuracy * (1 - self.accuracy)
        return whole * (self.share + (1 - self.share) / samples)

    def half_width(self, problems: int, samples: float) -> float:
        """About half of the 95% interval that an evaluation prints: for other such problems, too (`metrics.accuracy_interval`)."""
        low, high = interval_of(self.accuracy, self.variance(samples), problems, least=1 / samples)
        return (high - low) / 2

    def repeat_width(self, problems: int, samples: float) -> float:
        """Half of the 95% interval for the same problems sampled again: what is noise between two runs of one evaluation."""
        noise = self.accuracy * (1 - self.accuracy) * (1 - self.share) / samples
        return student(max(1, int(problems * samples) - 1)) * math.sqrt(noise / problems)


def spread_of(correct: Sequence[Sequence[bool]]) -> Spread | None:
    """The spread that a result shows, from each problem's verdicts; None where no problem has two samples, or all verdicts are equal.

    The variance within a problem is n / (n - 1) times s (1 - s) of its share s, which is unbiased; the rest of the variance of the
    shares, less what the within-part adds to it, lies between.
    """
    shares = np.array([sum(row) / len(row) for row in correct])
    counts = np.array([len(row) for row in correct], dtype=np.float64)
    several = counts > 1
    if several.sum() < 2 or not 0 < shares.mean() < 1:
        return None
    within = float((shares * (1 - shares) * counts / (counts - 1))[several].mean())
    between = float(shares.var(ddof=1)) - within * float((1 / counts).mean())
    total = max(0.0, between) + within
    return Spread(float(shares.mean()), max(0.0, between) / total if total else 1.0)


def problems_needed(spread: Spread, samples: float, margin: float) -> int | None:
    """The fewest problems with a half width of at most `margin`; None for more than ten millions."""
    low, high = 0, 1
    while spread.half_width(high, samples) > margin:
        low, high = high, 2 * high
        if high > MOST_PROBLEMS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if spread.half_width(middle, samples) <= margin else (middle, high)
    return high


def how_many(margin: float, problems: int, spread: Spread) -> dict[str, Any]:
    """The plan for a wanted margin (half width of the 95% interval) on a benchmark of that many problems.

    rows: for each number of samples a problem the half width, that of the same problems sampled again, that of the worst case (each problem
    is solved always or never), and the problems needed. `samples`: the fewest listed that do; `limit`: the half width that no number of
    samples goes below. Raises ConfigError for a margin or an accuracy that can't be.
    """
    if not 0 < margin < 0.5:
        raise ConfigError(f"--how-many {margin:g}: the margin is a half width between 0 and 0.5, such as 0.02 for +- 2 points")  # fmt: skip
    if not 0 < spread.accuracy < 1:
        raise ConfigError(f"--accuracy {spread.accuracy:g}: give what you expect, above 0 and below 1")
    if problems < 1:
        raise ConfigError(f"--problems {problems}: give at least one")
    worst = Spread(spread.accuracy, 1.0)
    rows: list[dict[str, Any]] = [
        {
            "samples": k,
            "half_width": spread.half_width(problems, k),
            "same_problems": spread.repeat_width(problems, k),
            "worst_case": worst.half_width(problems, k),
            "problems_needed": problems_needed(spread, k, margin),
        }
        for k in SAMPLES
    ]
    return {
        "margin": margin,
        "problems": problems,
        "accuracy": spread.accuracy,
        "between_share": spread.share,
        "rows": rows,
        "samples": next((row["samples"] for row in rows if row["half_width"] <= margin), None),
        "same_problems_samples": next((row["samples"] for row in rows if row["same_problems"] <= margin), None),
        "limit": spread.half_width(problems, math.inf),
        "problems_at_limit": problems_needed(spread, math.inf, margin),
    }
