"""What an evaluation found on one benchmark: its numbers, and the file that they are kept in."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrl.errors import ConfigError
from llmrl.evaluation.also import summary
from llmrl.evaluation.metrics import accuracy_interval, mean_interval, mean_pass_at_k
from llmrl.evaluation.votes import format_rate, mean_maj_at_k
from llmrl.train.files import write_atomically

FORMAT = "llmrl-result/1"
_KEYS = {
    "format", "benchmark", "n", "samples", "accuracy", "interval", "pass_at_k", "maj_at_k", "format_rate", "truncation_rate", "mean_length",
    "mean_reward", "reward_interval", "failures", "breakdown", "also", "missing", "manifest", "per_row",
}  # fmt: skip


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found, on one benchmark; `to_dict` is the result file, which `llmrl compare` and `llmrl report` read.

    `rows` has one mapping a problem: id, prompt (as the model was asked), gold (the reference answer), then lists with an item a sample:
    correct, rewards, outcomes, answers (what was read out of the completion, None for nothing), lengths (tokens; None for completions that
    came as text), finish, completions, notes (the scorer's);
    then `meta`, the problem's columns that accuracy is broken down by, and `classes` where there was a vote: samples of equal classes gave
    the same answer, and `also` where the benchmark has further scorers. Problems may have different numbers of samples.
    """

    rows: list[dict[str, Any]]
    benchmark: str = ""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = ()
    reads_answers: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the result file."""
    path: Path | None = None
    """Where it was saved, or loaded from."""

    @property
    def samples(self) -> int:
        """Completions a problem; the fewest, where problems have different numbers."""
        return min(len(row["correct"]) for row in self.rows)

    @property
    def correct(self) -> list[int]:
        """How many of its completions are right, a problem."""
        return [sum(row["correct"]) for row in self.rows]

    @property
    def accuracy(self) -> float:
        """The mean over problems of the share of right completions (avg@samples)."""
        return self._accuracy(self.rows)[0]

    @property
    def interval(self) -> tuple[float, float]:
        """95%, see `metrics.accuracy_interval`."""
        return self._accuracy(self.rows)[1:]

    @property
    def pass_at_k(self) -> dict[int, float]:
        """Over the problems with at least k samples."""
        return mean_pass_at_k(self.correct, [len(row["correct"]) for row in self.rows])

    @property
    def maj_at_k(self) -> dict[int, float] | None:
        """None where nothing was voted on: one sample a problem, or a scorer that reads no answers."""
        if not self.rows or any("classes" not in row for row in self.rows):
            return None
        return mean_maj_at_k([row["classes"] for row in self.rows], [row["correct"] for row in self.rows])

    @property
    def format_rate(self) -> float | None:
        """Share of completions with an answer in them; None for a scorer that reads none."""
        return format_rate([row["answers"] for row in self.rows]) if self.reads_answers else None

    @property
    def failures(self) -> dict[str, int]:
        """Completions without a reward, by reason."""
        return dict(Counter(reason for row in self.rows for reason in row["outcomes"] if reason != "score"))

    @property
    def truncation_rate(self) -> float | None:
        """Share of completions that the token limit cut; None where nobody knows."""
        return _mean([float(reason == "length") for row in self.rows for reason in row["finish"] if reason is not None])

    @property
    def mean_length(self) -> float | None:
        """Tokens a completion, the stop token included; None where nobody knows."""
        return _mean([float(length) for row in self.rows for length in row["lengths"] if length is not None])

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

    @property
    def breakdown(self) -> dict[str, dict[str, dict[str, Any]]]:
        """column -> value -> n, accuracy, interval; problems without the column are left out."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for column in dict.fromkeys(name for row in self.rows for name in row["meta"]):
            parts: dict[Any, list[dict[str, Any]]] = {}
            for row in self.rows:
                if row["meta"].get(column) is not None:
                    parts.setdefault(row["meta"][column], []).append(row)
            found[column] = {}
            for value in sorted(parts, key=lambda v: (isinstance(v, str), v)):
                accuracy, *interval = self._accuracy(parts[value])
                found[column][str(value)] = {"n": len(parts[value]), "accuracy": accuracy, "interval": interval}
        return found

    @property
    def also(self) -> dict[str, dict[str, Any]]:
        """Further numbers of the same completions by name, see `also.summary`."""
        return summary(self.rows)

    def in_order(self, ids: Sequence[str]) -> EvalResult:
        """The same result with its rows in the order of `ids`: processes that share the problems hand them in by process."""
        place = {id: i for i, id in enumerate(ids)}
        return replace(self, rows=sorted(self.rows, key=lambda row: place[row["id"]]))

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
            "reward": self.mean_reward,
        }
        if self.reward_interval is not None:
            values["reward_low"], values["reward_high"] = self.reward_interval
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """The result file: JSON-serialisable, the rows last."""
        return {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "n": len(self.rows),
            "samples": self.samples,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "pass_at_k": _by_k(self.pass_at_k),
            "maj_at_k": _by_k(self.maj_at_k),
            "format_rate": self.format_rate,
            "truncation_rate": self.truncation_rate,
            "mean_length": self.mean_length,
            "mean_reward": self.mean_reward,
            "reward_interval": self.reward_interval and list(self.reward_interval),
            "failures": self.failures,
            "breakdown": self.breakdown,
            **({"also": also} if (also := self.also) else {}),
            "missing": list(self.missing),
            **self.extra,
            "manifest": dict(self.manifest),
            "per_row": self.rows,
        }

    def save(self, path: str | Path) -> Path:
        """Writes the result file, whole or not at all. Raises ConfigError where it can't be written."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        except OSError as error:
            raise ConfigError(
                f"the result {path} can't be written: {error.strerror or error}. Make room and run it again (samples that were written "
                "beside it are not sampled again), or give the path of another file"
            ) from error
        return path

    @staticmethod
    def load(path: str | Path) -> EvalResult:
        """What `save` wrote. Raises ValueError for another file."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("per_row"), list):
            raise ValueError(f"it has no `format: {FORMAT}` with rows")
        if absent := [key for key in ("benchmark", "manifest", "missing", "format_rate") if key not in found]:
            raise ValueError(f"it has no {', '.join(absent)}")
        return EvalResult(
            found["per_row"],
            found["benchmark"],
            found["manifest"],
            found["missing"],
            reads_answers=found["format_rate"] is not None,
            extra={key: value for key, value in found.items() if key not in _KEYS},
            path=Path(path),
        )

    @staticmethod
    def _accuracy(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
        return accuracy_interval([sum(row["correct"]) for row in rows], [len(row["correct"]) for row in rows])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _by_k(values: Mapping[int, float] | None) -> dict[str, float] | None:
    return None if values is None else {str(k): value for k, value in values.items()}
