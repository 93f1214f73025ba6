"""Workers for one reward function: tasks go to whoever is free, each has a deadline of its own, a stuck worker is replaced."""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from llmrl.errors import RewardError
from llmrl.rewards.process import WorkerProcess

START_SECONDS = 180.0
MAX_FAILED_STARTS = 3
# A chunk is as many tasks as take about this long: few messages where tasks are cheap, and nobody waits long behind a slow one.
CHUNK_SECONDS, MAX_CHUNK, FIRST_CHUNK = 0.05, 256, 8
_TICK = 0.1
_PAUSE = 0.001  # between two looks at workers that all have more than one task left: a wake-up a task costs more than a cheap task

T = TypeVar("T")


class Work(Generic[T]):
    """Tasks that a pool was given together; `future` has their results, in order. `begun` and `ended` are times (monotonic)."""

    def __init__(
        self, tasks: Sequence[Mapping[str, Any]], seconds: float, answer: Callable[[dict[str, Any]], T],
        failure: Callable[[int, str, str], T], retries: int,
    ) -> None:  # fmt: skip
        self.tasks, self.seconds, self.answer, self.failure, self.retries = tasks, seconds, answer, failure, retries
        self.results: dict[int, T] = {}
        self.future: Future[list[T]] = Future()
        self.begun, self.ended, self.cancelled = time.monotonic(), 0.0, False

    def settle(self, number: int, result: T) -> None:
        """Writes down a task's result; that of the last one completes the future."""
        self.results[number] = result
        if len(self.results) == len(self.tasks):
            self.ended = time.monotonic()
            self.future.set_result([self.results[n] for n in range(len(self.tasks))])


@dataclass(eq=False)
class Job:
    """One task of a `Work`, and how many workers it has taken with it."""

    work: Work[Any]
    number: int
    deaths: int = 0


class WorkerPool:
    """`size` workers that have loaded one function, for any number of callers at once: tasks are taken in the order they came in.

    A thread of its own tends the workers for as long as there is work.
    setup: {"target", "args", "name", "memory_bytes": {"row", "batch"}} as `llmrl.rewards.worker` reads it.
    """

    def __init__(self, setup: Mapping[str, Any], size: int) -> None:
        self._setup, self.size = dict(setup), size
        self._workers = [WorkerProcess(self._setup)]
        self._lock = threading.RLock()  # reentrant: a garbage collection may call `close` anywhere
        self._waiting: deque[Job] = deque()
        self._open: dict[Work[Any], None] = {}
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        self._closed, self._failed_starts = False, 0
        self._mean: float | None = None  # seconds a task, of late
        try:
            self.description = self._wait_for_first()
        except BaseException:
            self.close()
            raise

    def grow(self, size: int) -> None:
        """Starts further workers, without waiting for them."""
        with self._lock:
            self.size = size
            self._replenish()

    def start(
        self, tasks: Sequence[Mapping[str, Any]], seconds: float, answer: Callable[[dict[str, Any]], T],
        failure: Callable[[int, str, str], T], *, retries: int,
    ) -> Work[T]:  # fmt: skip
        """Hands tasks to the workers and returns at once.

        `failure(number, kind, detail)` makes the result of a task that ran over `seconds` of work (kind "timeout") or took its worker
        with it (kind "error") `retries` + 1 times. Both callbacks run in the pool's thread. The future raises RewardError when workers
        can't start or the pool is closed meanwhile.
        """
        work = Work(tasks, seconds, answer, failure, retries)
        if not tasks:
            work.future.set_result([])
            return work
        with self._lock:
            if self._closed:
                raise RewardError(f"reward function {self._setup['target']!r}: the runner is closed")
            self._open[work] = None
            self._waiting.extend(Job(work, n) for n in range(len(tasks)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="llmrl-reward-pool", daemon=True)
                self._thread.start()
            else:
                self._wake()
        return work

    def run(
        self, tasks: Sequence[Mapping[str, Any]], seconds: float, answer: Callable[[dict[str, Any]], T],
        failure: Callable[[int, str, str], T], *, retries: int,
    ) -> list[T]:  # fmt: skip
        """As `start`, and waits: one result a task, in order."""
        return self.start(tasks, seconds, answer, failure, retries=retries).future.result()

    def cancel(self, work: Work[Any]) -> None:
        """Drops what has no result yet. Workers that are at it are replaced, within a moment."""
        with self._lock:
            if work in self._open:
                work.cancelled = True
                self._wake()

    def close(self) -> None:
        """Kills the workers; unfinished work raises RewardError. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            self._wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock:
            self._fail(
                RewardError(f"reward function {self._setup['target']!r}: the runner was closed while it was scoring")
            )
            for worker in self._workers:
                worker.kill()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake
            os.write(self._wake_write, b"!")

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 1 << 10)

    def _serve(self) -> None:
        while True:
            with self._lock:
                try:
                    self._drop_cancelled()
                    if self._closed or not self._open:
                        self._thread = None
                        return
                    self._replenish()
                    self._assign()
                    poll, timeout = self._poll()
                    pause = all(len(w.chunk) > 1 for w in self._workers)
                except BaseException as error:
                    self._fail(error)
                    continue
            poll.poll(timeout * 1000)
            if pause:
                time.sleep(_PAUSE)
            with self._lock:
                try:
                    self._receive()
                except BaseException as error:
                    self._fail(error)

    def _drop_cancelled(self) -> None:
        gone = [work for work in self._open if work.cancelled]
        if not gone:
            return
        for work in gone:
            del self._open[work]
            work.future.cancel()
        for worker in self._workers:
            if any(job.work.cancelled for job in worker.chunk):
                self._waiting.extendleft(reversed(worker.chunk))
                worker.kill()
        self._waiting = deque(job for job in self._waiting if not job.work.cancelled)

    def _fail(self, error: BaseException) -> None:
        """Everybody who waits gets the error, and nothing is left to do."""
        works = list(self._open)
        self._open.clear()
        self._waiting.clear()
        for worker in self._workers:
            if worker.state in ("busy", "starting"):
                worker.kill()
        for work in works:
            work.future.set_exception(error)

    def _assign(self) -> None:
        for worker in self._workers:
            if worker.state == "idle" and self._waiting:
                # A task that has already taken a worker with it goes alone, so that nobody else waits behind it.
                alone = self._waiting[0].deaths > 0
                most = FIRST_CHUNK if self._mean is None else max(1, min(MAX_CHUNK, int(CHUNK_SECONDS / self._mean)))
                count = 1 if alone else min(most, -(-len(self._waiting) // (4 * self.size)))
                jobs = [self._waiting.popleft() for _ in range(count)]
                worker.assign(jobs, [job.work.tasks[job.number] for job in jobs])

    def _receive(self) -> None:
        """Takes in what the workers have sent, and replaces those that died or are late."""
        self._drain()
        for worker in self._workers:
            if worker.state == "dead":
                continue
            worker.flush()
            messages = worker.receive()
            # Whether it lives is asked (a system call) only where it is silent.
            ended = worker.died() if worker.broken or not messages else None
            if ended:
                messages += worker.receive()  # what it wrote before its end
            for message in messages:
                job = worker.chunk.popleft()
                seconds = max(1e-6, message["seconds"])
                self._mean = seconds if self._mean is None else 0.9 * self._mean + 0.1 * seconds
                self._settle(job, job.work.answer(message))
            if worker.state == "busy" and not worker.chunk:
                worker.state = "idle"
            if ended:
                self._count_failed_start(worker, ended)
                self._replace(worker, "error", ended)
            elif worker.state == "busy" and time.monotonic() > _due(worker):
                self._replace(worker, "timeout", f"no answer after {worker.chunk[0].work.seconds:g} s of work")
            elif worker.state == "busy" and worker.begun is None and time.monotonic() - worker.since > START_SECONDS:
                self._replace(worker, "error", f"its worker did not begin within {START_SECONDS:g} s")
            elif worker.state == "starting" and time.monotonic() - worker.since > START_SECONDS:
                self._count_failed_start(worker, f"it was not ready after {START_SECONDS:g} s")
                worker.kill()

    def _replace(self, worker: WorkerProcess, kind: str, detail: str) -> None:
        """The first task of the chunk is to blame; the others go back to the front of the queue."""
        chunk = list(worker.chunk)
        worker.kill()
        if chunk:
            first = chunk[0]
            first.deaths += 1
            if kind == "timeout" or first.deaths > first.work.retries:
                self._settle(first, first.work.failure(first.number, kind, detail))
                chunk = chunk[1:]
        self._waiting.extendleft(reversed(chunk))

    def _settle(self, job: Job, result: Any) -> None:
        if len(job.work.results) + 1 == len(job.work.tasks):
            del self._open[job.work]
        job.work.settle(job.number, result)

    def _replenish(self) -> None:
        self._workers = [w for w in self._workers if w.state != "dead"]
        while len(self._workers) < self.size and not self._closed:
            self._workers.append(WorkerProcess(self._setup))

    def _poll(self) -> tuple[select.poll, float]:
        """What to wait for (a message, a call of `_wake`, room in a pipe), and for how many seconds: until a deadline could be over, or
        a worker dead."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        for worker in self._workers:
            poll.register(worker.results, select.POLLIN)
            if worker.outgoing_fd is not None:
                poll.register(worker.outgoing_fd, select.POLLOUT)
        now = time.monotonic()
        return poll, max(0.0, min([_TICK, *(_due(w) - now for w in self._workers)]))

    def _wait_for_first(self) -> dict[str, Any]:
        worker = self._workers[0]
        while worker.state == "starting":
            poll, timeout = self._poll()
            poll.poll(timeout * 1000)
            worker.flush()
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


def _due(worker: WorkerProcess) -> float:
    """When (monotonic) the task that it is at will have had its time."""
    return worker.begun + worker.chunk[0].work.seconds if worker.chunk and worker.begun is not None else math.inf
