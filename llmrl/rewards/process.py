"""One worker process, seen from the runner: non-blocking pipes, and a kill that takes everything it has started with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llmrl
from llmrl import errors
from llmrl.rewards.protocol import Decoder, encode

_PACKAGE_ROOT = str(Path(llmrl.__file__).resolve().parents[1])
_live: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()


class WorkerProcess:
    """A spawned interpreter that loads one function and then works through chunks of tasks.

    States: "starting", "idle", "busy", "dead". `begun` is the time (monotonic) at which work on the first task of `chunk` began,
    None as long as the worker has not said so: start-up and delivery do not count.
    """

    def __init__(self, setup: Mapping[str, Any]) -> None:
        tasks_read, self._tasks = os.pipe()
        self.results, results_write = os.pipe()
        life_read, self._lifeline = os.pipe()
        theirs = (tasks_read, results_write, life_read)
        search = os.pathsep.join(filter(None, [_PACKAGE_ROOT, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": search}
        # -P: the working directory must not shadow the standard library; the worker gets it at the end of its path.
        command = [sys.executable, "-P", "-m", "llmrl.rewards.worker", *map(str, theirs)]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=theirs, start_new_session=True, env=environment
            )
        finally:
            for fd in theirs:
                os.close(fd)
        os.set_blocking(self._tasks, False)
        os.set_blocking(self.results, False)
        self.state = "starting"
        self.description: dict[str, Any] = {}
        self.chunk: deque[Any] = deque()
        self.begun: float | None = None
        self.since = time.monotonic()
        self._decoder, self._outgoing = Decoder(), bytearray()
        self.broken = ""  # why nothing more can come from it
        _live.add(self)
        self._send({**setup, "sys_path": [*dict.fromkeys(p or os.getcwd() for p in [*sys.path, os.getcwd()])]})

    def assign(self, chunk: Sequence[Any], tasks: Sequence[Mapping[str, Any]]) -> None:
        """Sends the tasks; results come back in their order. `chunk` is what the caller knows each of them by."""
        self.chunk, self.begun, self.state, self.since = deque(chunk), None, "busy", time.monotonic()
        self._send({"tasks": tasks})

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived. State changes of the worker itself are handled here; results are returned.

        Raises ConfigError or RewardError when the worker could not load its function.
        """
        messages, data = [], b"start"
        while data:
            try:
                data = os.read(self.results, 1 << 18)
                messages += self._decoder.feed(data)
            except BlockingIOError:
                break
            except ValueError:
                self.broken = "its worker sent something that is not the protocol"
                break
        if not data:
            self.broken = "its worker closed its pipe"
        answers = []
        for message in messages:
            if "ready" in message:
                self.description, self.state = message["ready"], "idle"
            elif "refused" in message:
                self.kill()
                raise getattr(errors, message["refused"])(message["message"])
            elif "started" in message:
                self.begun = time.monotonic()
            else:
                self.begun = time.monotonic()
                answers.append(message)
        return answers

    def flush(self) -> None:
        """Writes what the pipe takes now."""
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self._tasks, self._outgoing[: 1 << 16])]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._outgoing.clear()

    @property
    def outgoing_fd(self) -> int | None:
        return self._tasks if self._outgoing else None

    def died(self) -> str | None:
        """How the worker came to its end by itself, or None while it works."""
        code = self.process.poll()
        if code is None and self.broken:
            try:
                code = self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                return self.broken
        if code is None:
            return None
        return f"its worker exited with code {code}" if code >= 0 else f"its worker was killed by {_signal_name(-code)}"

    def kill(self) -> None:
        """Ends the process, its guard and whatever it has started in its group. May be called twice."""
        if self.state == "dead":
            return
        self.state = "dead"
        _live.discard(self)
        # The pid is ours until it is waited for, and the group lives as long as its guard: no other group can be hit.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for fd in (self._tasks, self.results, self._lifeline):
            os.close(fd)

    def close_in_fork(self) -> None:
        for fd in (self._tasks, self.results, self._lifeline):
            try:
                os.close(fd)
            except OSError:
                continue

    def _send(self, message: Any) -> None:
        self._outgoing += encode(message)
        self.flush()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _forget_after_fork() -> None:
    """A forked child (a data loader, say) must not hold the workers' pipes open after the runner's end."""
    for worker in list(_live):
        worker.close_in_fork()
    _live.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
