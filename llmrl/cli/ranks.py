"""The processes of a run on this machine: start them, pass signals on, end with their exit code and say what went wrong once.

A process that is told to stop saves a checkpoint first, which takes as long as a step does: nobody hurries it. One that fails ends the
others, which would wait for it. One whose launcher is gone, killed or not, is told to stop by the kernel.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

GRACE = 30.0
"""Seconds that the others have after a process failed: to notice it, and to say what they know."""
_KILL = 10.0
_POLL = 0.1
_PID, _ERRORS = "LLMRL_LAUNCHER_PID", "LLMRL_LAUNCHER_ERRORS"
_PR_SET_PDEATHSIG = 1


def run_ranks(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Runs `command` once with each environment, and waits for all.

    Returns 0, or the exit code of the first process that failed (128 + N: it was ended by signal N; 130: Ctrl-C twice). SIGTERM,
    SIGHUP and a first Ctrl-C are passed on as SIGTERM; a second Ctrl-C kills.
    """
    with tempfile.TemporaryDirectory(prefix="llmrl-launch-") as folder:
        ranks = _Ranks()
        previous = {
            number: signal.signal(number, ranks.on_signal) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            own = {_PID: str(os.getpid()), _ERRORS: folder}
            for environment in environments:
                ranks.start(command, {**environment, **own})
            code = ranks.wait()
        finally:
            ranks.kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
        for text in summary(errors(folder), len(environments)):
            print(text, file=sys.stderr)
    return code


class _Ranks:
    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = False
        self._killed = False

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # A process group of its own: Ctrl-C in a terminal reaches this process only, which passes it on as SIGTERM.
        self._processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0))
        if self._stopping:
            self._processes[-1].terminate()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._stopping:
            self._killed = True
            self.kill()
            return
        if number == signal.SIGINT:
            print(
                "\nllmrl: a run saves a checkpoint after this step, then it stops; Ctrl-C again ends it at once",
                file=sys.stderr,
            )
        self._stopping = True
        self._send(signal.SIGTERM)

    def wait(self) -> int:
        """Until all have ended. After the first failure the others have GRACE seconds, then SIGTERM, then SIGKILL."""
        failed, deadline = 0, math.inf
        measures = [signal.SIGTERM, signal.SIGKILL]
        while None in (codes := [process.poll() for process in self._processes]):
            if not failed and any(codes):
                failed, deadline = next(code for code in codes if code), time.monotonic() + GRACE
            if time.monotonic() > deadline and measures:
                number = measures.pop(0)
                print(
                    f"llmrl: {codes.count(None)} process(es) still run after another has failed: {number.name}",
                    file=sys.stderr,
                )
                self._send(number)
                deadline += _KILL
            time.sleep(_POLL)
        if self._killed:
            return 130
        failed = failed or next((code for code in codes if code), 0)
        return failed if failed >= 0 else 128 - failed

    def kill(self) -> None:
        """Ends what still runs."""
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)  # nothing, to one that has ended


def follow_launcher(env: Mapping[str, str]) -> None:
    """In a process that a launcher of ours has started: SIGTERM when the launcher ends, however it ends (Linux)."""
    if _PID not in env or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(env[_PID]):  # it ended before that
        os.kill(os.getpid(), signal.SIGTERM)


def explain(text: str, env: Mapping[str, str]) -> None:
    """Says what went wrong in this process: to its launcher, which says once what several processes say, or on the screen."""
    if _ERRORS in env:
        try:
            Path(env[_ERRORS], env.get("RANK", "0")).write_text(text, encoding="utf-8")
            return
        except OSError:  # a full disk may be what went wrong
            pass
    rank = f" (process {env['RANK']})" if "RANK" in env and int(env.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"llmrl: error{rank}: {text}", file=sys.stderr)


def errors(folder: str) -> dict[int, str]:
    """What the processes explained, by rank."""
    return {
        int(path.name): path.read_text(encoding="utf-8")
        for path in sorted(Path(folder).iterdir(), key=lambda p: int(p.name))
    }


def summary(texts: Mapping[int, str], processes: int) -> list[str]:
    """One line for each thing that went wrong, with its processes unless it is all of them.

    What only repeats another's words ("rank 0 failed: ...") is left out: it says that this process stopped because of that one.
    """
    causes: dict[str, str] = {}
    for text in texts.values():
        if not any(o != text and o in text for o in texts.values()):
            # Of several that lost the same process ("rank 1 died, so rank 0 can't go on ..."), the first one speaks.
            causes.setdefault(text.partition(", so rank ")[0], text)
    lines = []
    for start, cause in causes.items():
        ranks = [rank for rank, text in texts.items() if text.partition(", so rank ")[0] == start]
        where = "" if len(ranks) == processes else f" (process {', '.join(map(str, ranks))})"
        lines.append(f"llmrl: error{where}: {cause}")
    return lines
