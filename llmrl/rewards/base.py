"""What a reward function is, what it may answer, and how one is called.

Two kinds. A *batch function* has TRL's signature: it gets lists (`prompts`, `completions`, dataset columns) and returns one value a
completion. A *row verifier* scores one completion at a time, so that each row can have a deadline of its own.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmrl.errors import DataError

SCORE, NOT_APPLICABLE, MALFORMED, TIMEOUT, ERROR = "score", "not-applicable", "malformed", "timeout", "error"
OUTCOMES = (SCORE, NOT_APPLICABLE, MALFORMED, TIMEOUT, ERROR)
FAILURES = (MALFORMED, TIMEOUT, ERROR)
NOTE_CHARACTERS = 300

# What the runner itself passes. Columns and recipe arguments of these names are never forwarded.
LOGGERS = ("log_extra", "log_metric")
BATCH_INPUTS = ("prompts", "completions", "completion_ids", "trainer_state", *LOGGERS)
ROW_INPUTS = ("prompt", "completion", "completion_ids", "trainer_state", *LOGGERS)


@dataclass(frozen=True)
class Outcome:
    """What became of one row. `value` is set for kind "score" only; `detail` says what went wrong, or is the note of a score.

    `row_caused`: the failure is put down to the row, not to the function (ran out of time or memory, or took its worker with it).
    """

    kind: str
    value: float | None = None
    detail: str = ""
    row_caused: bool = False

    @property
    def note(self) -> str:
        """The first line of `detail`: what the sample table shows."""
        return self.detail.partition("\n")[0][:NOTE_CHARACTERS]


class Noted(float):
    """A score that says why: a number like any other, with a note for whoever reads the samples.

    Example: return Noted(0.0, "read 0.7, the reference is 3/4")
    """

    note: str

    def __new__(cls, value: float, note: str) -> Noted:
        made = super().__new__(cls, value)
        made.note = note
        return made


def wrong(read: Any, reference: Any) -> Noted:
    """0, with what was read of an answer and what it should be."""
    return Noted(
        0.0, "no answer found" if read is None else f"read {_short(read)}, the reference is {_short(reference)}"
    )


def _short(value: Any) -> str:
    text = " ".join(str(value)[:400].split())
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass
class Result:
    """What one call gave: an outcome a row, `log_extra` columns (a plain value a row each), `log_metric` values in call order.

    `seconds`: what each row took, None where nobody knows; of a call for all rows each has an equal share. Empty until it is timed.
    """

    outcomes: list[Outcome]
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: list[tuple[str, float]] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)

    def timed(self, seconds: float) -> Result:
        """This result, with the time of the call shared among its rows."""
        self.seconds = [seconds / max(1, len(self.outcomes))] * len(self.outcomes)
        return self

    def to_json(self) -> dict[str, Any]:
        outcomes = [[o.kind, o.value, o.detail, o.row_caused] for o in self.outcomes]
        return {
            "outcomes": outcomes,
            "extra": self.extra,
            "metrics": self.metrics,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Result:
        metrics = [(str(name), float(value)) for name, value in data["metrics"]]
        return Result([Outcome(*o) for o in data["outcomes"]], dict(data["extra"]), metrics)

    @staticmethod
    def failed(kind: str, detail: str, rows: int = 1, row_caused: bool = False) -> Result:
        return Result([Outcome(kind, None, detail, row_caused)] * rows)


class TrainerState(dict):
    """The trainer's state, with attribute access as TRL's functions expect it: `trainer_state.global_step`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"trainer_state has no {name!r}; it has {sorted(self)}") from None


class RowVerifier:
    """A function that scores one row; made by `row_verifier`.

    Calling it follows TRL's batch signature, so the same object also works as a `reward_funcs` entry of TRL.

    Example: think_format(completions=["<think>a</think>b"]) -> [1.0]; think_format.score("<think>a</think>b") -> 1.0
    """

    def __init__(
        self,
        score: Callable[..., Any],
        *,
        safe: bool = False,
        check_gold: Callable[..., str | None] | None = None,
        check_args: Callable[..., str | None] | None = None,
        warm_up: Callable[[], None] | None = None,
        read_answer: Callable[..., str | None] | None = None,
        runs_code: bool = False,
        by_row: bool = False,
        seconds: float | None = None,
    ) -> None:
        if inspect.iscoroutinefunction(score):
            raise TypeError(
                f"{score.__name__}: a row verifier runs one row at a time and can't be async; write a batch function"
            )
        self.score, self.safe, self.runs_code, self.seconds = score, safe, runs_code, seconds
        self.by_row = by_row
        self.check_gold, self.check_args, self.warm_up = check_gold, check_args, warm_up
        self.read_answer = read_answer
        functools.update_wrapper(self, score)

    def __call__(self, prompts=None, completions=None, completion_ids=None, **columns: Any) -> list[float | None]:
        texts = None if completions is None else [completion_text(c) for c in completions]
        rows = len(next(c for c in (completions, completion_ids, prompts) if c is not None))
        arguments = parameters(self).keyword_only
        settings = {name: value for name, value in columns.items() if name in arguments}
        inputs = {"prompt": prompts, "completion": texts, "completion_ids": completion_ids}
        inputs |= {k: v for k, v in columns.items() if k not in settings and k not in (*LOGGERS, "trainer_state")}
        known = {k: v for k, v in inputs.items() if v is not None and parameters(self).takes(k)}
        return [self.score(**{k: v[i] for k, v in known.items()}, **settings) for i in range(rows)]


def row_verifier(score: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Declares a function that scores one row: `score(completion, answer, *, strict=True) -> float | None`.

    Parameters before `*` are the row: `completion` (text), `prompt`, `completion_ids`, `trainer_state`, `log_extra(column, value)`,
    `log_metric(name, value)` and dataset columns by name (`**columns` gets all of them). Parameters after `*` are arguments of the recipe.

    `safe=True` promises linear time and bounded memory on any text: such a function runs in the training process.
    A score may say why: `Noted(0.0, "2 of 3 tests passed")`; the note is shown beside it in the samples of a run.
    `check_gold(**columns, **args)` returns why the row's reference answer can't be used, or None. `check_args(**args)` likewise.
    `runs_code=True` says that it runs what the model wrote: a recipe must then allow it (`allow_code_execution: true`).
    `by_row=True` says that the column `verifier` tells what judges a row: whether code is run is then asked of the rows.
    `seconds` is the deadline of a row where the recipe gives no `timeout`.
    `read_answer(completion, **columns, **args)` returns what the function takes for the answer of a completion, or None; in linear time on any text.
    `warm_up()` is called in a worker before it takes rows: slow imports belong there, not into the first row's deadline.
    """
    return (lambda function: RowVerifier(function, **options)) if score is None else RowVerifier(score, **options)


@dataclass(frozen=True)
class Parameters:
    """The names that a reward function can be called with."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]
    required: tuple[str, ...]
    any_keyword: bool

    def takes(self, name: str) -> bool:
        return self.any_keyword or name in self.positional or name in self.keyword_only


def parameters(function: Callable[..., Any]) -> Parameters:
    """What `function` accepts by keyword. Callables without a signature (some C functions) are taken to accept everything."""
    try:
        signature = inspect.signature(function.score if isinstance(function, RowVerifier) else function)
    except (TypeError, ValueError):
        return Parameters((), (), (), True)
    found = signature.parameters.values()
    positional = tuple(p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD)
    keyword_only = tuple(p.name for p in found if p.kind is p.KEYWORD_ONLY)
    required = tuple(p.name for p in found if p.default is p.empty and p.name in positional + keyword_only)
    return Parameters(positional, keyword_only, required, any(p.kind is p.VAR_KEYWORD for p in found))


def completion_text(completion: Any) -> str:
    """The text of a completion in either of TRL's forms: a string, or messages (their contents joined)."""
    return completion if isinstance(completion, str) else "".join(str(m.get("content") or "") for m in completion)


def to_outcome(value: Any) -> Outcome:
    """A returned value as an outcome: numbers and bools score, None does not apply, anything else is malformed."""
    if value is None:
        return Outcome(NOT_APPLICABLE)
    if not isinstance(value, str | bytes | bytearray) and hasattr(type(value), "__float__"):
        try:
            number = float(value)
        except Exception as error:
            return Outcome(MALFORMED, None, f"returned {_shown(value)}, which is no number: {error}")
        if math.isfinite(number):
            return Outcome(SCORE, number, str(value.note)[:NOTE_CHARACTERS] if isinstance(value, Noted) else "")
    return Outcome(
        MALFORMED, None, f"returned {_shown(value)}; a reward is a finite number, or None where it does not apply"
    )


def to_outcomes(values: Any, rows: int) -> list[Outcome]:
    """What a batch function returned, a row each. A wrong length or a non-list is malformed for every row."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        values, problem = None, f"returned {_shown(values)}; expected a list of {rows} numbers"
    else:
        values = list(values)
        problem = f"returned {len(values)} values for {rows} completions"
    if values is None or len(values) != rows:
        return [Outcome(MALFORMED, None, problem)] * rows
    return [to_outcome(value) for value in values]


def literal(value: Any) -> Any:
    """What a text of JSON, or of a Python literal, stands for; anything else as it is. Raises DataError for a text that is neither."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)  # type: ignore[operator]
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise DataError(f"{value[:80]!r} is neither JSON nor a Python literal")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: containers are walked, numpy and tensor scalars unwrapped, the rest becomes its text."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python writes no more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    for convert in ("tolist", "item"):
        if hasattr(value, convert):
            return plain(getattr(value, convert)())
    return str(value)


def describe_error(error: BaseException) -> str:
    """The error and the last frames of its traceback, for a log."""
    frames = "".join(traceback.format_tb(error.__traceback__)[-3:])
    try:
        text = str(error)
    except Exception as second:
        text = f"<its text raised {type(second).__name__}>"
    return f"{type(error).__name__}: {text}\n{frames}".rstrip()


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:
        text = f"<repr raised {type(error).__name__}>"
    return f"{type(value).__name__} {text[:80]}"
