"""Reward functions in the training process: for what was built to be safe there, and for callables handed over in Python.

The deadline is soft: Python can't stop a thread. A function that ran over it is left behind in its thread, and reported.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import queue
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from llmrl.rewards.base import ERROR, TIMEOUT, Result
from llmrl.rewards.call import BoundFunction


class SoftThread:
    """One thread for all sync functions, so that what a function keeps per thread is still there at its next call."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Any] | None = None

    def call(self, function: Callable[[], Any], seconds: float) -> Any:
        """The function's result. Raises TimeoutError, and takes a new thread for the next call, when it is late."""
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._jobs,), name="llmrl-reward", daemon=True).start()
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._jobs.put((contextvars.copy_context(), _cuda_device(), function, answer))
        try:
            return answer.result(seconds)
        except concurrent.futures.TimeoutError:
            if not answer.done():
                self.close()
            raise

    def close(self) -> None:
        if self._jobs is not None:
            self._jobs.put(None)
        self._jobs = None


class AsyncThread:
    """One event loop in a thread, on which all async functions run together."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, coroutine: Coroutine[Any, Any, Any], seconds: float | None) -> concurrent.futures.Future[Any]:
        """Starts the coroutine; it is cancelled after `seconds`, where these are given."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="llmrl-reward-async", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, seconds), self._loop)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None

    def resolve(self, awaitable: Any) -> Any:
        """The value of what a sync function gave back to be awaited."""

        async def wait() -> Any:
            return await awaitable

        return self.start(wait(), threading.TIMEOUT_MAX).result()


class InlineRunner:
    """Runs bound functions here, for one caller at a time. Never raises for what a function does: that becomes outcomes."""

    def __init__(self) -> None:
        self._thread, self._loop = SoftThread(), AsyncThread()

    def run(self, bound: BoundFunction, task: dict[str, Any], seconds: float) -> Result:
        """A sync function's result, within `seconds`."""
        task = _own(task)
        try:
            return self._thread.call(lambda: bound.run(task, self._loop.resolve), seconds)
        except concurrent.futures.TimeoutError:
            return self._late(task["rows"], seconds)

    def start(self, bound: BoundFunction, task: dict[str, Any], seconds: float) -> Callable[[], Result]:
        """Starts an async function; call what comes back for its result."""
        future = self._loop.start(bound.run_async(_own(task)), seconds)

        def finish() -> Result:
            try:
                # A coroutine that blocks the loop can't be cancelled by it; one second of grace tells the two apart.
                return future.result(seconds + 1.0)
            except concurrent.futures.TimeoutError:
                if not future.done():
                    self._loop.close()
                return self._late(task["rows"], seconds)
            except concurrent.futures.CancelledError:
                return Result.failed(ERROR, "CancelledError: the function cancelled itself", task["rows"])

        return finish

    def close(self) -> None:
        self._thread.close()
        self._loop.close()

    @staticmethod
    def _late(rows: int, seconds: float) -> Result:
        return Result.failed(
            TIMEOUT, f"no answer after {seconds:g} s; it still runs in a thread that can't be stopped", rows
        )


def _own(value: Any) -> Any:
    """Lists and mappings copied, so that a function which changes its arguments changes neither the data nor what others get."""
    if type(value) is list:
        return [_own(v) for v in value]
    return {k: _own(v) for k, v in value.items()} if type(value) is dict else value


def _work(jobs: queue.SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        context, device, function, answer = job
        try:
            if device is not None:
                sys.modules["torch"].cuda.set_device(device)
            answer.set_result(context.run(function))
        except BaseException as error:
            answer.set_exception(error)


def _cuda_device() -> int | None:
    """The caller's CUDA device, where torch is loaded and in use: it is a setting of each thread, and a new one starts at 0."""
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else None
