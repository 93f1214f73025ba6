"""What scoring counts, for whoever asked for the scores: a step's numbers are not mixed with an evaluation's."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from llmrl.rewards.base import OUTCOMES, Result


class Tally:
    """The counts of one scoring call or of several, one after another. It belongs to one caller, and one thread at a time."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._logged: defaultdict[str, list[float]] = defaultdict(list)
        self._weights: dict[str, float] = {}

    def expect(self, names: Sequence[str]) -> None:
        """The functions whose counts are shown, also as 0."""
        self._names = list(names)

    def spend(self, name: str, seconds: float) -> None:
        self._seconds[name] += seconds

    def weigh(self, weights: Mapping[str, float]) -> None:
        """The weights of now of the functions whose weight changes over the run."""
        self._weights.update(weights)

    def count(self, name: str, result: Result) -> None:
        for metric, value in result.metrics:
            self._logged[metric].append(value)
        for outcome in result.outcomes:
            self._counts[f"{name}/{outcome.kind}"] += 1

    def metrics(self) -> dict[str, float]:
        """Means of `log_metric` values, `reward_outcomes/<name>/<kind>` counts, `reward_seconds/<name>`: how long the function had rows
        to score, and `reward_weight/<name>` where a schedule sets it."""
        metrics = {name: sum(values) / len(values) for name, values in self._logged.items()}
        metrics |= {f"reward_weight/{name}": weight for name, weight in self._weights.items()}
        for name in self._names:
            for kind in OUTCOMES:
                metrics[f"reward_outcomes/{name}/{kind}"] = float(self._counts[f"{name}/{kind}"])
            metrics[f"reward_seconds/{name}"] = self._seconds[name]
        return metrics
