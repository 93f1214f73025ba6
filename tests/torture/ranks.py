"""Processes of one run that a test may lose one by one: each with its own output, its own end, and faults put where it stands."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.processes import start_processes


class Ranks:
    """`target(*args)` in `processes` processes, as torchrun would start them. Leaves none of them behind.

    Example: with Ranks(command, 2, tmp_path, ["sft", "--config", recipe]) as ranks: ranks.wait(30); ranks.codes == [2, -9]
    """

    def __init__(self, target: Callable[..., None], processes: int, directory: Path, *args: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._files = [(directory / f"out{rank}", directory / f"err{rank}") for rank in range(processes)]
        for file in (f for pair in self._files for f in pair):
            file.unlink(missing_ok=True)
        self.processes = start_processes(target, args, self._files)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def wait(self, timeout: float, but: int | None = None) -> None:
        """Until every process but `but` ended. Raises AssertionError, with what all wrote, after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while running := [p for r, p in enumerate(self.processes) if p.exitcode is None and r != but]:
            if not wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic())):
                shown = "\n".join(f"--- rank {r}\n{self.error(r)[-3000:]}" for r in range(len(self.processes)))
                raise AssertionError(f"{self.codes} after {timeout} s\n{shown}")

    def output(self, rank: int) -> str:
        file = self._files[rank][0]
        return file.read_text() if file.exists() else ""

    def error(self, rank: int) -> str:
        file = self._files[rank][1]
        return file.read_text() if file.exists() else ""


def command(argv: list[str], faults: list[tuple[int, str, str]] = []) -> None:  # noqa: B006
    """`llmrl ARGV`; each fault is (rank, pattern of a place, action): what befalls that rank the first time that it stands there."""
    from llmrl.cli.main import main

    if faults:
        _inject(faults)
    sys.exit(main(argv))


def _inject(faults: list[tuple[int, str, str]]) -> None:
    from llmrl.train.standing import Standing

    real, left = Standing._note, list(faults)

    def note(self: Standing, place: str, replace: bool) -> None:
        real(self, place, replace)
        stands = self.places()[0][0]
        for fault in [f for f in left if f[0] == self.rank and re.search(f[1], stands)]:
            left.remove(fault)
            print(f"fault: {fault[2]} at {stands}", file=sys.stderr, flush=True)
            ACTIONS[fault[2]]()

    Standing._note = note  # type: ignore[method-assign]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _fail() -> None:
    raise ValueError("row 17 can't be read")


def _hang() -> None:
    time.sleep(600)


def _no_large_files() -> None:
    """No file of this process may grow beyond 8 kB: as a disk that is full for it alone."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))


def _fill_disk() -> None:
    """Writes to the file BALLAST until its disk is full."""
    with open(os.environ["BALLAST"], "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def _poison() -> None:
    """This process's gradients are NaN from now on."""
    from llmrl.train.replicated import Replicated

    real = Replicated.backward
    Replicated.backward = lambda self, loss: real(self, loss * float("nan"))  # type: ignore[method-assign]


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _kill, "stop": _stop, "terminate": _terminate, "fail": _fail, "hang": _hang, "no large files": _no_large_files,
    "fill disk": _fill_disk, "poison": _poison,
}  # fmt: skip
