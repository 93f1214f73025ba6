"""Workers for one reward function: tasks go to whoever is free, each has a deadline of its own, a stuck worker is replaced."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from llmrl.errors import RewardError
from llmrl.rewards.process import WorkerProcess

START_SECONDS = 180.0
MAX_FAILED_STARTS = 3
MAX_CHUNK = 32
_TICK = 0.1

T = TypeVar("T")


class WorkerPool:
    """`size` workers that have loaded one function. Not for use from two threads at once.

    setup: {"target", "args", "name", "memory_bytes": {"row", "batch"}} as `llmrl.rewards.worker` reads it.
    """

    def __init__(self, setup: Mapping[str, Any], size: int) -> None:
        self._setup, self.size = dict(setup), size
        self._workers = [WorkerProcess(self._setup)]
        self._closed, self._failed_starts = False, 0
        try:
            self.description = self._wait_for_first()
        except BaseException:
            self.close()
            raise

    def grow(self, size: int) -> None:
        """Starts further workers, without waiting for them."""
        self.size = size
        self._replenish()

    def run(
        self, tasks: Sequence[Mapping[str, Any]], seconds: float, answer: Callable[[dict[str, Any]], T],
        failure: Callable[[int, str, str], T], *, retries: int,
    ) -> list[T]:  # fmt: skip
        """One result a task, in order. `failure(number, kind, detail)` makes the result of a task that ran over `seconds` of work
        (kind "timeout") or took its worker with it (kind "error") `retries` + 1 times. Raises RewardError when workers can't start.
        """
        results: dict[int, T] = {}
        waiting, deaths = deque(range(len(tasks))), dict.fromkeys(range(len(tasks)), 0)

        def settle(worker: WorkerProcess, kind: str, detail: str) -> None:
            """The first task of the chunk is to blame; the others go back to the front of the queue."""
            chunk = list(worker.chunk)
            worker.kill()
            if chunk:
                deaths[chunk[0]] += 1
                if kind == "timeout" or deaths[chunk[0]] > retries:
                    results[chunk[0]] = failure(chunk[0], kind, detail)
                    chunk = chunk[1:]
            waiting.extendleft(reversed(chunk))

        while len(results) < len(tasks) and not self._closed:
            self._replenish()
            for worker in self._workers:
                if worker.state == "idle" and waiting:
                    # A task that has already taken a worker with it goes alone, so that nobody else waits behind it.
                    count = (
                        1 if deaths[waiting[0]] else min(MAX_CHUNK, -(-len(waiting) // (4 * self.size)), len(waiting))
                    )
                    numbers = [waiting.popleft() for _ in range(count)]
                    worker.assign(numbers, [tasks[n] for n in numbers])
            self._wait(seconds)
            for worker in list(self._workers):
                ended = worker.died()
                for message in worker.receive():
                    results[worker.chunk.popleft()] = answer(message)
                if worker.state == "busy" and not worker.chunk:
                    worker.state = "idle"
                if worker.state != "dead" and ended:
                    self._count_failed_start(worker, ended)
                    settle(worker, "error", ended)
                elif worker.state == "busy" and worker.begun is not None and time.monotonic() - worker.begun > seconds:
                    settle(worker, "timeout", f"no answer after {seconds:g} s of work")
                elif worker.state == "starting" and time.monotonic() - worker.since > START_SECONDS:
                    self._count_failed_start(worker, f"it was not ready after {START_SECONDS:g} s")
                    worker.kill()
        if self._closed:
            raise RewardError(f"reward function {self._setup['target']!r}: the runner was closed while it was scoring")
        return [results[n] for n in range(len(tasks))]

    def abort(self) -> None:
        """Makes a `run` in another thread raise within a moment."""
        self._closed = True

    def close(self) -> None:
        """Kills the workers. May be called twice, but not while `run` is at work in another thread: `abort` that first."""
        self._closed = True
        for worker in self._workers:
            worker.kill()

    def _replenish(self) -> None:
        self._workers = [w for w in self._workers if w.state != "dead"]
        while len(self._workers) < self.size and not self._closed:
            self._workers.append(WorkerProcess(self._setup))

    def _wait(self, seconds: float) -> None:
        """Sleeps until a pipe has something, or a deadline or a death could be due."""
        now = time.monotonic()
        ends = [w.begun + seconds - now for w in self._workers if w.state == "busy" and w.begun is not None]
        timeout = max(0.0, min([_TICK, *ends]))
        reading = [w.results for w in self._workers if w.state != "dead"]
        writing = {w.outgoing_fd: w for w in self._workers if w.state != "dead" and w.outgoing_fd is not None}
        poll = select.poll()
        for fd in reading:
            poll.register(fd, select.POLLIN)
        for fd in writing:
            poll.register(fd, select.POLLOUT)
        for fd, _ in poll.poll(timeout * 1000):
            if fd in writing:
                writing[fd].flush()

    def _wait_for_first(self) -> dict[str, Any]:
        worker = self._workers[0]
        while worker.state == "starting":
            self._wait(START_SECONDS)
            ended = worker.died()
            worker.receive()
            if worker.state == "starting" and (ended or time.monotonic() - worker.since > START_SECONDS):
                raise RewardError(
                    f"reward function {self._setup['target']!r} could not be loaded: {ended or f'not ready after {START_SECONDS:g} s'}"
                )
        return worker.description

    def _count_failed_start(self, worker: WorkerProcess, how: str) -> None:
        self._failed_starts = self._failed_starts + 1 if worker.state == "starting" else 0
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise RewardError(
                f"reward function {self._setup['target']!r}: {self._failed_starts} workers in a row could not start; {how}"
            )
