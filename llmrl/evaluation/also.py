"""Further numbers of the same completions, such as IFEval's loose accuracies: scored with the rest, in no sum with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.config.benchmark import AlsoScored, BenchmarkSpec
from llmrl.config.reward import RewardSpec
from llmrl.evaluation.metrics import accuracy_interval, mean_interval
from llmrl.types import Prompt, ScoredRollout


def scorers(spec: BenchmarkSpec) -> list[RewardSpec]:
    """What a `RewardRunner` for the benchmark is made of: its scorer, then the others by their names, with weight 0."""
    others = [s.scorer.model_copy(update={"name": name, "weight": 0.0}) for name, s in spec.also.items()]
    return [spec.scorer, *others]


def also_of(prompt: Prompt, scored: Sequence[ScoredRollout], also: Mapping[str, AlsoScored]) -> dict[str, Any]:
    """The item `also` of a problem's row: by name the samples' values, and the problem's weight."""
    found = {}
    for name, extra in also.items():
        weight = 1 if extra.weight is None else prompt.columns[extra.weight]
        found[name] = {"weight": weight, "values": [s.parts.get(name) for s in scored]}
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By name: `value`, the weighted mean over completions (one without a value counts 0), and its 95% `interval`, null where nothing is
    known of the spread.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.get("also", ())):
        parts = [row["also"][name] for row in rows]
        values = [[0.0 if v is None else float(v) for v in part["values"]] for part in parts]
        value, low, high = _interval(values, [int(part["weight"]) for part in parts])
        found[name] = {"value": value, "interval": [low, high] if math.isfinite(low) else None}
    return found


def _interval(values: list[list[float]], weights: list[int]) -> tuple[float, float, float]:
    shares = all(0 <= v <= 1 for row in values for v in row)
    n = min(map(len, values))
    if shares and len(set(weights)) == 1:
        return accuracy_interval([n * sum(row) / len(row) for row in values], n)
    # A problem that counts w times is w problems of the same mean, which are not independent: `mean_interval` is made for that.
    found = mean_interval([[sum(row) / len(row)] * w for row, w in zip(values, weights, strict=True)])
    assert found is not None
    if not shares:
        return found
    if math.isinf(found[1]):  # all the same: each problem is one answer
        return accuracy_interval([found[0]] * len(values), 1)
    return found[0], max(0.0, found[1]), min(1.0, found[2])
