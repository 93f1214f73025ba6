"""Completions that exist already, judged as a model's would be: outputs of any system, on a benchmark, without a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from llmrl.config.data import DatasetSource
from llmrl.data.sources import Row, load_rows
from llmrl.errors import ConfigError, DataError
from llmrl.evaluation.also import scorers
from llmrl.evaluation.benchmarks import Benchmark, asked
from llmrl.evaluation.judges import LocalJudges
from llmrl.evaluation.manifest import data_entry, template_entry, verifier_entry, versions
from llmrl.evaluation.result import EvalResult
from llmrl.evaluation.runner import add_classes, row_of
from llmrl.evaluation.votes import reads_answers
from llmrl.rewards.runner import RewardRunner
from llmrl.types import Completion, Prompt, Rollout, ScoredRollout

MISSING = "missing"
_AT_ONCE = 512


def read_predictions(path: str | Path) -> dict[str, list[str | None]]:
    """The completions by problem id: of a JSON, JSON Lines (also .gz) or Parquet file of `{id, completion}` or `{id, completions: [...]}`,
    or of a result file of `llmrl eval`.

    A completion is a text, null (there is none), or chat messages, of which the assistant's after the last user's turn count. Raises
    ConfigError for a file that is not there, DataError for rows that are no predictions and ids that stand twice.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a directory; give the file in it" if path.is_dir() else "does not exist"
        raise ConfigError(f"predictions: {path} {what} (current directory: {Path.cwd()})")
    found: dict[str, list[str | None]] = {}
    for row in _rows(path):
        id = row.values.get("id")
        if id is None or not str(id).strip():
            raise DataError(f"{row.origin}: no `id`; a prediction is {{id, completion}} or {{id, completions: [...]}}")
        if str(id) in found:
            raise DataError(
                f"{row.origin}: the id {str(id)!r} stands twice. Several samples of one problem are one row: {{id, completions: [...]}}"
            )
        found[str(id)] = _completions(row)
    return found


def _rows(path: Path) -> Sequence[Row]:
    if path.suffix == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError):
            value = None  # perhaps objects one a line; else the reader says what is wrong
        if isinstance(value, dict) and isinstance(value.get("per_row"), list):
            if not all(isinstance(row, dict) for row in value["per_row"]):
                raise DataError(f"{path}: per_row must list objects, one a problem; give a result of llmrl eval")
            return [Row(row, f"{path}: per_row {i}") for i, row in enumerate(value["per_row"], start=1)]
    return load_rows([DatasetSource(path=str(path))])


def _completions(row: Row) -> list[str | None]:
    one, several = "completion" in row.values, "completions" in row.values
    if one == several:
        raise DataError(
            f"{row.origin}: give `completion` or `completions`, one of the two; the row has: {', '.join(map(str, row.values))}"
        )
    given = [row.values["completion"]] if one else row.values["completions"]
    if not isinstance(given, list | tuple):
        raise DataError(
            f"{row.origin}: `completions` must be a list, given {type(given).__name__}; one text is `completion`"
        )
    return [_text(value, row.origin) for value in given]


def _text(value: Any, origin: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple) or not all(isinstance(t, Mapping) and "role" in t for t in turns):
        raise DataError(
            f"{origin}: a completion is a text, null or chat messages, given {type(value).__name__}: {str(value)[:80]}"
        )
    asked = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    said = [_content(turn.get("content")) for turn in turns[asked + 1 :] if turn["role"] == "assistant"]
    return "".join(said) if said else None


def _content(content: Any) -> str:
    """A turn's text, also where it is a list of parts."""
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def matched(
    benchmark: Benchmark, predictions: Mapping[str, list[str | None]], *, allow_missing: bool = False
) -> tuple[list[list[str | None]], list[str]]:
    """The completions of each problem, in order, and the ids of the problems without any.

    A problem without any gets as many nulls as the others have completions at most. Predictions for rows of the data that are of another
    split are left out. Raises DataError for ids that are no problem's, and
    unless `allow_missing` for problems without a prediction and for completions that are null.
    """
    ids = [problem["id"] for problem in benchmark.problems]
    known = {*ids, *benchmark.others}
    unknown = [id for id in predictions if id not in known]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(predictions)} predictions are of no problem of {benchmark.name}: {_first(unknown)}. Its ids are "
            f"such as {_first(ids)}"
        )
    missing = [id for id in ids if not any(c is not None for c in predictions.get(id, ()))]
    null = [id for id in ids if id not in set(missing) and None in predictions[id]]
    if (missing or null) and not allow_missing:
        what = [
            f"{len(group)} of {len(ids)} problems {text}: {_first(group)}"
            for group, text in ((missing, "have no completion"), (null, "have a completion that is null"))
            if group
        ]
        raise DataError(f"{'; '.join(what)}. Add them, or --allow-missing counts them as wrong")
    most = max((len(predictions[id]) for id in ids if id in predictions), default=0) or 1
    none: list[str | None] = [None] * most
    lists = [none if id in set(missing) else predictions[id] for id in ids]
    return lists, missing


def _first(ids: Sequence[str]) -> str:
    return ", ".join(map(repr, ids[:5])) + (", ..." if len(ids) > 5 else "")


def score_predictions(
    benchmark: Benchmark, path: str | Path, *, allow_missing: bool = False, allow_code_execution: bool = False,
    workers: int = 2, progress: bool = False,
) -> EvalResult:  # fmt: skip
    """Judges the predictions in a file by the benchmark's scorer; the result is as one of `llmrl eval`, with lengths unknown.

    Missing and null completions, where they are allowed, are wrong with the outcome "missing". Problems may have different numbers of
    completions. Raises what `read_predictions` and `matched` do, and ConfigError for a benchmark that compares log-probs, and for code
    without `allow_code_execution`.
    """
    spec = benchmark.spec
    if spec.mode == "choices":
        raise ConfigError(
            f"benchmark {benchmark.name} compares log-probs of a model and has no completions to judge; answers in letters are those of "
            f"{benchmark.name.removesuffix('_logprob')}"
        )
    predictions = read_predictions(path)
    lists, missing = matched(benchmark, predictions, allow_missing=allow_missing)
    prompts = [
        Prompt(
            str(r.values["id"]),
            (),
            r.values["prompt"],
            {k: v for k, v in r.values.items() if k not in ("id", "prompt")},
        )
        for r in asked(benchmark)
    ]
    with RewardRunner(
        scorers(spec),
        on_error="skip",
        workers=workers,
        allow_code_execution=allow_code_execution,
        make_judge=LocalJudges(),
    ) as runner:
        unusable = runner.check_golds(prompts)
        scored = _scored(runner, prompts, lists, progress)
    rows = [_row(benchmark, prompt, group, texts) for prompt, group, texts in zip(prompts, scored, lists, strict=True)]
    reads = reads_answers(spec.scorer)
    if reads and max(map(len, lists)) > 1:
        add_classes(rows, prompts, spec.scorer)
    extra: dict[str, Any] = {}
    if unusable:
        extra["unusable_answers"] = [{"id": b.prompt_id, "reason": b.reason} for b in unusable]
    if elsewhere := sorted(benchmark.others & predictions.keys()):
        extra["other_split"] = elsewhere
    return EvalResult(rows, benchmark.name, _manifest(benchmark, Path(path)), missing, reads, extra)


def _scored(
    runner: RewardRunner, prompts: Sequence[Prompt], lists: Sequence[Sequence[str | None]], progress: bool
) -> list[list[ScoredRollout]]:
    """Every completion with its score; null ones are not shown to the scorer."""
    rollouts = [
        Rollout(prompt, Completion((), (), "stop", text or ""), index)
        for prompt, texts in zip(prompts, lists, strict=True)
        for index, text in enumerate(texts)
    ]
    given = [text is not None for texts in lists for text in texts]
    todo = [rollout for rollout, there in zip(rollouts, given, strict=True) if there]
    done: list[ScoredRollout] = []
    for start in track(range(0, len(todo), _AT_ONCE), "judging", disable=not progress, transient=True):
        done += runner.score(todo[start : start + _AT_ONCE])
    fetched = iter(done)
    every = iter(
        [next(fetched) if there else ScoredRollout(r, None, {}) for r, there in zip(rollouts, given, strict=True)]
    )
    return [[next(every) for _ in texts] for texts in lists]


def _row(
    benchmark: Benchmark, prompt: Prompt, scored: Sequence[ScoredRollout], texts: Sequence[str | None]
) -> dict[str, Any]:
    spec = benchmark.spec
    row = row_of(prompt, scored, spec.threshold, spec.scorer, spec.breakdown, spec.also)
    unknown = [None] * len(texts)
    outcomes = [MISSING if text is None else kind for text, kind in zip(texts, row["outcomes"], strict=True)]
    answers = [None if text is None else answer for text, answer in zip(texts, row["answers"], strict=True)]
    return {**row, "outcomes": outcomes, "answers": answers, "lengths": unknown, "finish": list(unknown)}


def _manifest(benchmark: Benchmark, path: Path) -> dict[str, Any]:
    """What is known: the problems, the verifier and the file; nothing of the model and how it was asked."""
    return {
        "model": {"name": None, "weights_sha256": None},
        "tokenizer_sha256": None,
        "template": template_entry(None, None),
        "chat_template_sha256": None,
        "sampling": {},
        "engine": None,
        "predictions": {"path": str(path), "sha256": hashlib.sha256(path.expanduser().read_bytes()).hexdigest()},
        "data": data_entry(benchmark.path, benchmark.problems),
        "seed": None,
        "verifier": verifier_entry(benchmark.spec.scorer, benchmark.spec.threshold),
        "versions": versions(),
    }
