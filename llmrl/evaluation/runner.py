"""Accuracy of a model on problems, by the same scorer as training.

A completion is right when its reward reaches the threshold. One without a reward (the scorer raised, ran out of time, answered
malformed, or did not apply) counts as wrong, and is listed under `failures`: it is never a silent 0.
"""

from __future__ import annotations

import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llmrl.errors import DataError, together
from llmrl.evaluation.metrics import accuracy_interval, mean_interval, mean_pass_at_k
from llmrl.experience.collect import Scorer
from llmrl.types import Prompt, RolloutEngine, Sampling, ScoredRollout

_FAILURES = ("malformed", "timeout", "error")


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found; `rows` has one mapping a problem: id, correct, rewards, outcomes, lengths, finish, completions.

    `failures` counts the completions without a reward, by reason. `settings` is filled by the caller: model, data, sampling.
    """

    n: int
    rows: list[dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def correct(self) -> list[int]:
        return [sum(row["correct"]) for row in self.rows]

    @property
    def accuracy(self) -> float:
        return accuracy_interval(self.correct, self.n)[0]

    @property
    def interval(self) -> tuple[float, float]:
        """95%, see `metrics.accuracy_interval`."""
        return accuracy_interval(self.correct, self.n)[1:]

    @property
    def pass_at_k(self) -> dict[int, float]:
        return mean_pass_at_k(self.correct, self.n)

    @property
    def failures(self) -> dict[str, int]:
        return dict(Counter(reason for row in self.rows for reason in row["outcomes"] if reason != "score"))

    @property
    def truncation_rate(self) -> float:
        """Share of completions that the token limit cut."""
        return self._mean([float(reason == "length") for row in self.rows for reason in row["finish"]])

    @property
    def mean_length(self) -> float:
        """Tokens a completion, the stop token included."""
        return self._mean([float(length) for row in self.rows for length in row["lengths"]])

    @property
    def mean_reward(self) -> float | None:
        """Over the completions that have a reward; None without any."""
        found = mean_interval([row["rewards"] for row in self.rows])
        return found[0] if found else None

    @property
    def reward_interval(self) -> tuple[float, float] | None:
        """95% of the mean reward, see `metrics.mean_interval`; None where nothing is known of the spread."""
        found = mean_interval([row["rewards"] for row in self.rows])
        return found[1:] if found and math.isfinite(found[1]) else None

    def metrics(self) -> dict[str, float]:
        """The numbers that a trainer logs."""
        low, high = self.interval
        values = {
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "completions/mean_length": self.mean_length,
            "completions/clipped_ratio": self.truncation_rate,
            "scorer_failures": float(sum(self.failures.values())),
        }
        if self.mean_reward is not None:
            values["reward"] = self.mean_reward
        if self.reward_interval is not None:
            values["reward_low"], values["reward_high"] = self.reward_interval
        return values

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; the settings (model, data, ...) come first and the rows last."""
        return {
            **self.settings,
            "problems": len(self.rows),
            "n": self.n,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "pass_at_k": {str(k): value for k, value in self.pass_at_k.items()},
            "mean_reward": self.mean_reward,
            "reward_interval": self.reward_interval and list(self.reward_interval),
            "truncation_rate": self.truncation_rate,
            "mean_length": self.mean_length,
            "failures": self.failures,
            "versions": versions(),
            "per_row": self.rows,
        }

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)


def evaluate(
    prompts: Sequence[Prompt],
    engine: RolloutEngine,
    scorer: Scorer,
    *,
    n: int,
    sampling: Sampling,
    threshold: float = 0.5,
    batch_size: int = 64,
    gather: Callable[[Any], list[Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
    trainer_state: Mapping[str, Any] | None = None,
) -> EvalResult:
    """Samples `n` completions of each prompt, `batch_size` prompts at once, scores them and counts.

    Several processes give each its own share of the prompts and `gather`, which returns every process's value in rank order;
    all of them get the whole result. `trainer_state` is what reward functions see of a run. Raises DataError when there is no
    prompt at all; what the engine and the scorer raise passes, and is an LLMRLError on the other processes.
    """
    gather = gather or (lambda value: [value])
    most = max(gather(len(prompts)))  # all call the engine equally often: it may need all of them

    def sample() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        right = 0
        with _bar(progress) as bar:
            task = bar.add_task("evaluate", total=len(prompts), accuracy="")
            for start in range(0, most, batch_size):
                asked = prompts[start : start + batch_size]
                with scorer.session(asked, trainer_state) as session:
                    scored = session.finish(engine.generate(asked, n, sampling, on_group=session.add))
                for group in scored:
                    rows.append(_row(group, threshold))
                    right += sum(rows[-1]["correct"])
                bar.update(task, completed=len(rows), accuracy=f"accuracy {right / max(len(rows) * n, 1):.3f}")
        return rows

    rows = [row for part in gather(together(sample, gather)) for row in part]
    if not rows:
        raise DataError("nothing to evaluate: the data hold no usable problem")
    return EvalResult(n, rows, dict(settings or {}))


def _row(scored: Sequence[ScoredRollout], threshold: float) -> dict[str, Any]:
    completions = [s.rollout.completion for s in scored]
    return {
        "id": scored[0].rollout.prompt.id,
        "correct": [s.reward is not None and s.reward >= threshold for s in scored],
        "rewards": [s.reward for s in scored],
        "outcomes": [outcome(s) for s in scored],
        "lengths": [len(c.ids) for c in completions],
        "finish": [c.finish_reason for c in completions],
        "completions": [c.text for c in completions],
    }


def outcome(scored: ScoredRollout) -> str:
    """ "score", or why there is no whole score: the worst of what happened in any reward function, else "not-applicable"."""
    for reason in _FAILURES:
        if reason in scored.outcomes.values():
            return reason
    return "score" if scored.reward is not None else "not-applicable"


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("llmrl", "torch", "transformers", "math-verify"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _bar(show: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, disable=not show, transient=True)
