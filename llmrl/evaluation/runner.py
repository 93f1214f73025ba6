"""Accuracy of a model on problems, by the same scorer as training.

A completion is right when its reward reaches the threshold. One without a reward (the scorer raised, ran out of time, answered
malformed, or did not apply) counts as wrong, and is listed under `failures`: it is never a silent 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llmrl.config.benchmark import AlsoScored
from llmrl.config.reward import RewardSpec
from llmrl.errors import DataError, together
from llmrl.evaluation.also import also_of
from llmrl.evaluation.journal import Journal
from llmrl.evaluation.result import EvalResult
from llmrl.evaluation.votes import Ballot, classes, extract, reads_answers
from llmrl.experience.collect import Scorer, Session
from llmrl.types import Completion, OnGroup, Prompt, Rollout, Sampling, ScoredRollout

__all__ = ["EvalResult", "Sampler", "evaluate", "outcome", "row_of"]

_FAILURES = ("malformed", "timeout", "error")
_CHUNK = 32
"""Samples that are scored in one call, while others are still being sampled."""


class Sampler(Protocol):
    """The part of a `RolloutEngine` that an evaluation needs."""

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]: ...


def evaluate(
    prompts: Sequence[Prompt],
    engine: Sampler,
    scorer: Scorer,
    *,
    n: int,
    sampling: Sampling,
    threshold: float = 0.5,
    batch_size: int = 64,
    gather: Callable[[Any], list[Any]] | None = None,
    progress: bool = False,
    trainer_state: Mapping[str, Any] | None = None,
    name: str = "",
    judged_by: RewardSpec | None = None,
    breakdown: Sequence[str] = (),
    also: Mapping[str, AlsoScored] | None = None,
    cut: Sequence[str] = (),
    journal: Journal | None = None,
    manifest: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> EvalResult:
    """Samples `n` completions of each prompt, `batch_size` prompts at once, scores them and counts.

    Every sample is a request of its own, whose randomness is keyed by seed, problem and number: the first samples are the same whatever
    `n` is, and whatever was sampled before. With a `journal` each is written down as it finishes, and those in it are not sampled again.
    `judged_by` is what `scorer` was made of: with it answers are read out of completions, and put to the vote. `breakdown` names columns;
    `also` what `scorer` values besides (`also.scorers`). A completion is read up to the first of `cut`. `extra`: further keys of the result.

    Several processes give each its own share of the prompts and `gather`, which returns every process's value in rank order;
    all of them get the whole result. `trainer_state` is what reward functions see of a run. Raises DataError when there is no
    prompt at all; what the engine and the scorer raise passes, and is an LLMRLError on the other processes.
    """
    gather = gather or (lambda value: [value])
    most = max(gather(len(prompts)))  # all call the engine equally often: it may need all of them

    def sample() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        with Bar(progress, name or "evaluate", len(prompts) * n) as bar:
            for start in range(0, most, batch_size):
                asked = prompts[start : start + batch_size]
                with _scoring(scorer, trainer_state, threshold, bar) as scoring:
                    _sample(asked, n, sampling, engine, journal, cut, scoring, bar)
                    scored = scoring.finish()
                for number, prompt in enumerate(asked):
                    group = [scored[number * n + i] for i in range(n)]
                    rows.append(row_of(prompt, group, threshold, judged_by, breakdown, also))
        if n > 1 and judged_by is not None and reads_answers(judged_by):
            add_classes(rows, prompts, judged_by)
        return rows

    rows = [row for part in gather(together(sample, gather)) for row in part]
    if not rows:
        raise DataError("nothing to evaluate: the data hold no usable problem")
    return EvalResult(
        rows,
        name,
        dict(manifest or {}),
        reads_answers=judged_by is not None and reads_answers(judged_by),
        extra=dict(extra or {}),
    )


def _sample(
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    engine: Sampler,
    journal: Journal | None,
    cut: Sequence[str],
    scoring: _Scoring,
    bar: Bar,
) -> None:
    """Hands `n` samples of every prompt to `scoring`, numbered in order: those of the journal, then new ones as they finish."""
    todo: list[tuple[int, Prompt, int]] = []
    for place, (prompt, index) in enumerate((p, i) for p in prompts for i in range(n)):
        known = journal.found(prompt.id, index) if journal is not None else None
        if known is None:
            todo.append((place, prompt, index))
        else:
            bar.took(known, sampled=False)
            scoring.add(place, _read(prompt, known, index, cut))

    def finished(number: int, group: list[Rollout]) -> None:
        place, prompt, index = todo[number]
        completion = group[0].completion
        if journal is not None:
            journal.add(prompt.id, index, completion)
        bar.took(completion)
        scoring.add(place, _read(prompt, completion, index, cut))

    requests = [replace(prompt, id=_request_id(prompt.id, index)) for _, prompt, index in todo]
    announced: set[int] = set()

    def on_group(number: int, group: list[Rollout]) -> None:
        announced.add(number)
        finished(number, group)

    for number, group in enumerate(engine.generate(requests, 1, sampling, on_group=on_group)):
        if number not in announced:
            finished(number, group)


def _request_id(problem: str, index: int) -> str:
    """What keys a sample's randomness: the first sample's key does not depend on how many there are."""
    return problem if index == 0 else f"{problem}#{index}"


def _read(prompt: Prompt, completion: Completion, index: int, cut: Sequence[str]) -> Rollout:
    """The sample as it is judged: its text up to the first of `cut`."""
    end = min((at for mark in cut if (at := completion.text.find(mark)) >= 0), default=None)
    return Rollout(prompt, completion if end is None else replace(completion, text=completion.text[:end]), index)


@contextmanager
def _scoring(scorer: Scorer, trainer_state: Any, threshold: float, bar: Bar) -> Iterator[_Scoring]:
    scoring = _Scoring(scorer, trainer_state, threshold, bar)
    try:
        yield scoring
    except BaseException as error:
        scoring.abandon(error)
        raise


class _Scoring:
    """Scores samples in chunks while others are still sampled: a chunk begins when it is full and is fetched when the next one is."""

    def __init__(self, scorer: Scorer, trainer_state: Any, threshold: float, bar: Bar) -> None:
        self.scorer, self.trainer_state, self.threshold, self.bar = scorer, trainer_state, threshold, bar
        self._waiting: list[tuple[int, Rollout]] = []
        self._open: tuple[list[tuple[int, Rollout]], Session] | None = None
        self._scored: dict[int, ScoredRollout] = {}

    def add(self, place: int, rollout: Rollout) -> None:
        self._waiting.append((place, rollout))
        if len(self._waiting) == _CHUNK:
            self._begin()

    def finish(self) -> dict[int, ScoredRollout]:
        """Every sample's score, by its place."""
        self._begin()
        self._fetch()
        return self._scored

    def abandon(self, error: BaseException) -> None:
        if self._open is not None:
            self._open[1].__exit__(type(error), error, error.__traceback__)
            self._open = None

    def _begin(self) -> None:
        self._fetch()
        if not self._waiting:
            return
        chunk, self._waiting = self._waiting, []
        session = self.scorer.session([rollout.prompt for _, rollout in chunk], self.trainer_state)
        session.__enter__()
        self._open = chunk, session
        for number, (_, rollout) in enumerate(chunk):
            session.add(number, [rollout])

    def _fetch(self) -> None:
        if self._open is None:
            return
        chunk, session = self._open
        scored = session.finish([[rollout] for _, rollout in chunk])
        session.__exit__(None, None, None)
        self._open = None
        for (place, _), (one,) in zip(chunk, scored, strict=True):
            self._scored[place] = one
            self.bar.judged(is_right(one, self.threshold))


def is_right(scored: ScoredRollout, threshold: float) -> bool:
    return scored.reward is not None and scored.reward >= threshold


def row_of(
    prompt: Prompt,
    scored: Sequence[ScoredRollout],
    threshold: float,
    judged_by: RewardSpec | None = None,
    breakdown: Sequence[str] = (),
    also: Mapping[str, AlsoScored] | None = None,
) -> dict[str, Any]:
    """A problem's row of the result, see `EvalResult`; `judged_by` reads the answers out of the completions."""
    completions = [s.rollout.completion for s in scored]
    reads = judged_by is not None and reads_answers(judged_by)
    return {
        "id": prompt.id,
        "prompt": prompt.text,
        "gold": prompt.columns.get("answer"),
        "correct": [is_right(s, threshold) for s in scored],
        "rewards": [s.reward for s in scored],
        "outcomes": [outcome(s) for s in scored],
        "answers": [extract(judged_by, c.text, prompt.columns) if judged_by and reads else None for c in completions],
        "lengths": [len(c.ids) for c in completions],
        "finish": [c.finish_reason for c in completions],
        "completions": [c.text for c in completions],
        "notes": [
            "; ".join(note for name, note in s.notes.items() if name not in (also or {})) or None for s in scored
        ],
        "meta": {name: prompt.columns.get(name) for name in breakdown},
        **({"also": also_of(prompt, scored, also)} if also else {}),
    }


def add_classes(rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt], judged_by: RewardSpec) -> None:
    """Puts `classes` into the rows of these prompts: which samples gave the same answer, by the verifier."""
    ballots = [Ballot(r["id"], r["answers"], r["correct"], p.columns) for r, p in zip(rows, prompts, strict=True)]
    for row, labels in zip(rows, classes(judged_by, ballots), strict=True):
        row["classes"] = labels


def outcome(scored: ScoredRollout) -> str:
    """ "score", or why there is no whole score: the worst of what happened in any reward function, else "not-applicable"."""
    for reason in _FAILURES:
        if reason in scored.outcomes.values():
            return reason
    return "score" if scored.reward is not None else "not-applicable"


class Bar:
    """The progress of one benchmark: samples, running accuracy, tokens a second of what is sampled now."""

    def __init__(self, show: bool, title: str, total: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, disable=not show, transient=True, console=Console(stderr=True))
        self._title, self._total, self._task = title, total, TaskID(0)
        self._began, self._tokens, self._scored, self._right = time.monotonic(), 0, 0, 0

    def __enter__(self) -> Bar:
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._total, status="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int = 1) -> None:
        self._progress.update(self._task, advance=count)

    def took(self, completion: Completion, *, sampled: bool = True) -> None:
        self._tokens += len(completion.ids) if sampled else 0
        self._progress.update(self._task, advance=1, status=self._status())

    def judged(self, right: bool) -> None:
        self._scored += 1
        self._right += right
        self._progress.update(self._task, status=self._status())

    def _status(self) -> str:
        speed = f"{self._tokens / max(time.monotonic() - self._began, 1e-9):.0f} tokens/s"
        return f"accuracy {self._right / self._scored:.3f}, {speed}" if self._scored else speed
