"""One reward function with its arguments, ready to be called: the same object serves in a worker and in the training process."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llmrl.rewards.base import (
    BATCH_INPUTS,
    ERROR,
    LOGGERS,
    MALFORMED,
    ROW_INPUTS,
    Outcome,
    Result,
    RowVerifier,
    TrainerState,
    describe_error,
    parameters,
    plain,
    to_outcome,
    to_outcomes,
)


class BoundFunction:
    """A reward function and the recipe's arguments. A *task* is what it is called with: one row, or a whole batch.

    task: {"rows": number of rows, "inputs": {name: value}}; a row verifier's inputs are a row's, a batch function's are lists.
    """

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any], name: str) -> None:
        self.args, self.name = dict(args), name
        self.verifier = function if isinstance(function, RowVerifier) else None
        self.rowwise = self.verifier is not None
        self.function: Callable[..., Any] = function.score if isinstance(function, RowVerifier) else function
        self.parameters = parameters(function)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(type(function), "__call__", None)  # noqa: B004  (an object with an async __call__)
        )

    def describe(self) -> dict[str, Any]:
        """What a runner must know to call it from outside, as JSON."""
        own = ROW_INPUTS if self.rowwise else BATCH_INPUTS
        p = self.parameters
        settings = (*own, *self.args, *(p.keyword_only if self.rowwise else ()))
        return {
            "name": self.name,
            "rowwise": self.rowwise,
            "names": sorted({*p.positional, *p.keyword_only} - {*self.args, *LOGGERS}),
            "any_keyword": p.any_keyword,
            "columns": [n for n in p.required if n not in settings],
            "safe": self.verifier is not None and self.verifier.safe,
            "checks_gold": self.verifier is not None and self.verifier.check_gold is not None,
            "seconds": None if self.verifier is None else self.verifier.seconds,
            "runs_code": self.verifier is not None and self.verifier.runs_code,
            "by_row": self.verifier is not None and self.verifier.by_row,
            "is_async": self.is_async,
        }

    def run(self, task: Mapping[str, Any], resolve: Callable[[Any], Any] | None = None) -> Result:
        """Calls the function. What it raises becomes outcomes, but for a KeyboardInterrupt; `resolve` turns an awaitable into its value."""
        result = Result([])
        try:
            value = self.function(**self._arguments(task, result))
            if inspect.isawaitable(value):
                if resolve is None:
                    raise TypeError("an awaitable came back where none can be awaited")
                value = resolve(value)
            result.outcomes = self._outcomes(value, task["rows"])
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, GeneratorExit and users' own among them
            result.outcomes = self._failure(error, task["rows"])
        return _checked_extra(result, task["rows"])

    async def run_async(self, task: Mapping[str, Any]) -> Result:
        """As `run`, for an async function on a running loop."""
        result = Result([])
        try:
            result.outcomes = self._outcomes(await self.function(**self._arguments(task, result)), task["rows"])
        except asyncio.CancelledError:  # by its deadline
            raise
        except BaseException as error:  # also KeyboardInterrupt: this is not the thread that Ctrl-C interrupts
            result.outcomes = self._failure(error, task["rows"])
        return _checked_extra(result, task["rows"])

    def warm_up(self) -> None:
        """Does what the first call would otherwise do slowly, so that no row's deadline pays for an import."""
        if self.verifier is not None and self.verifier.warm_up is not None:
            self.verifier.warm_up()

    def check_gold(self, columns: Mapping[str, Any]) -> str | None:
        """Why this row's reference answer can't be used, or None. For a verifier that `checks_gold`."""
        assert self.verifier is not None and self.verifier.check_gold is not None
        try:
            return self.verifier.check_gold(**columns, **self.args)
        except Exception as error:
            return describe_error(error)

    def _arguments(self, task: Mapping[str, Any], result: Result) -> dict[str, Any]:
        inputs = {**task["inputs"], **self.args}
        if "trainer_state" in inputs:
            inputs["trainer_state"] = TrainerState(inputs["trainer_state"])
        if self.parameters.takes("log_extra"):
            rowwise = self.rowwise
            inputs["log_extra"] = lambda column, values: result.extra.__setitem__(
                str(column), [plain(v) for v in ([values] if rowwise else values)]
            )
        if self.parameters.takes("log_metric"):
            inputs["log_metric"] = lambda name, value: result.metrics.append((str(name), float(value)))
        return inputs

    def _outcomes(self, value: Any, rows: int) -> list[Outcome]:
        return [to_outcome(value)] if self.rowwise else to_outcomes(value, rows)

    def _failure(self, error: BaseException, rows: int) -> list[Outcome]:
        exhausted = self.rowwise and isinstance(error, MemoryError | RecursionError)
        return Result.failed(ERROR, describe_error(error), rows, exhausted).outcomes


def _checked_extra(result: Result, rows: int) -> Result:
    wrong = {name: len(values) for name, values in result.extra.items() if len(values) != rows}
    if wrong and not any(o.kind == ERROR for o in result.outcomes):
        return Result.failed(MALFORMED, f"log_extra got columns of the wrong length (expected {rows}): {wrong}", rows)
    return result


@contextmanager
def event_loop() -> Iterator[Callable[[Any], Any]]:
    """A loop that lives as long as the worker, so that an async function may keep its sessions between calls."""
    with asyncio.Runner() as runner:

        async def wait(awaitable: Any) -> Any:
            return await awaitable

        yield lambda awaitable: runner.run(wait(awaitable))
