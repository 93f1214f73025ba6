"""Runs Python that a model wrote, for the verifier of code: the host's side of `sandbox_zygote` and `sandbox_guest`.

A `Sandbox` holds one confined interpreter, from which every run is forked. What confines it is in docs/code.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmrl.errors import ConfigError, RewardError
from llmrl.rewards.protocol import Decoder

START_SECONDS = 60.0
# A run that waits, and computes nothing, may take this much longer than one that computes: neighbours may have the processors.
PATIENCE = 3.0
_TICK = 0.02
_ZYGOTE = Path(__file__).with_name("sandbox_zygote.py")


@dataclass(frozen=True)
class Limits:
    """test_seconds, seconds: processor time of one test, and of all. By the clock both may be PATIENCE times longer. output_bytes: of a program."""

    test_seconds: float = 8.0
    seconds: float = 16.0
    memory_mb: int = 1024
    output_bytes: int = 1 << 20


@dataclass
class Report:
    """What became of the tests: a share in [0, 1] for each (1: passed), and why not."""

    shares: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timed_out: bool = False

    def add(self, share: float, note: str = "") -> None:
        self.shares.append(share)
        self.notes.append(note)


class Guest:
    """One run, seen from outside. `ended` is {"code": exit code or minus signal, "cpu": seconds} once it is over."""

    def __init__(self, life: socket.socket) -> None:
        self.life, self._pid, self._rest = life, 0, b""
        self.ended: dict[str, Any] | None = None

    def wait_until_started(self) -> None:
        """Raises RewardError when it does not start."""
        while not self._pid and self.ended is None:
            self.listen(START_SECONDS)

    def listen(self, seconds: float) -> None:
        """Takes in what its keeper says within `seconds`. Raises RewardError when it could not be started."""
        self.life.settimeout(max(seconds, 0.001))
        try:
            data = self.life.recv(4096)
        except TimeoutError:
            if self._pid == 0:
                raise RewardError(f"the sandbox did not start a program within {START_SECONDS:g} s") from None
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "broken" in said:
                self.ended = {"code": 70, "cpu": 0.0}
                raise RewardError(f"the sandbox could not start a program: {said['broken']}")
            if "pid" in said:
                self._pid = said["pid"]
            else:
                self.ended = said
        if not data and self.ended is None:
            self.ended = {"code": -9, "cpu": 0.0}
            if self._pid == 0:
                raise RewardError("the sandbox could not start a program: its keeper ended")

    def cpu(self) -> float:
        """Processor time that it has used, in seconds."""
        if self.ended is None:
            clock = (~self._pid << 3) | 2  # of another process, as clock_getcpuclockid makes it
            with contextlib.suppress(OSError):
                return time.clock_gettime(clock)
        return self.ended["cpu"] if self.ended else 0.0

    def kill(self) -> None:
        """Has it killed, with all that it has started."""
        if self.ended is None:
            with contextlib.suppress(OSError):  # its keeper may be gone already
                self.life.shutdown(socket.SHUT_WR)

    def stop(self) -> None:
        """Kills it, and waits until it is gone."""
        self.kill()
        until = time.monotonic() + START_SECONDS
        with self.life:
            while self.ended is None and time.monotonic() < until:
                self.listen(until - time.monotonic())


class Sandbox:
    """Raises ConfigError where this machine can't confine a program. Not for several threads at once.

    mode "full": namespaces where the kernel lets this user have them, else as "minimal". mode "minimal": programs can open no files.
    `files` and `note`: whether programs have a tree of their own, and why not.
    """

    def __init__(self, mode: Literal["full", "minimal"] = "full") -> None:
        if sys.platform != "linux":
            raise ConfigError(
                f"running model-written code needs Linux: {sys.platform} has no means here to confine it. Run in a Linux container or VM"
            )
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Not the virtual environment's: nothing but the standard library is for the programs.
        command = [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B", str(_ZYGOTE), str(theirs.fileno()), mode]
        with theirs:
            self._zygote = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
                env={"PYTHONHASHSEED": "0"}, cwd="/",
            )  # fmt: skip
        self._control.settimeout(START_SECONDS)
        try:
            data = self._control.recv(1 << 16)
        except OSError as error:
            data = str(error).encode()
        self._control.settimeout(None)
        try:
            about = json.loads(data)
        except ValueError:
            about = {"refused": f"its process did not start: {data[:200].decode(errors='replace') or 'see above'}"}
        if "refused" in about:
            self.close()
            raise ConfigError(
                f"model-written code can't be confined here, so it is not run: {about['refused']}. Use a Linux container or VM that can"
            )
        self.files, self.note = bool(about["files"]), str(about["note"])
        try:
            (note,) = self.run(
                {"programs": ["print(1)"], "entry": None}, [""], Limits(), lambda n, out: None, stop=True
            ).notes
            if note:
                raise RewardError(f"a program that prints a number {note}")
        except (RewardError, BrokenPipeError) as error:
            self.close()
            raise ConfigError(f"model-written code can't be confined here, so it is not run: {error}") from error

    def close(self) -> None:
        """Ends all runs. May be called twice."""
        self._control.close()
        if self._zygote.poll() is None:
            try:
                self._zygote.wait(5)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()

    def test(self, code: Mapping[str, Any], tests: Mapping[str, Any], limits: Limits, count: int) -> Report:
        """Runs `count` tests against code. `code` and `tests` are the payloads of `sandbox_guest.candidate` and `.checker`.

        Raises RewardError when the tests, not the code, can't be run, BrokenPipeError when this sandbox has ended.
        """
        ours, theirs = os.pipe()
        link = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, ours)
            try:
                candidate = self._start("candidate", code, limits, [link[0].fileno()])
                stack.callback(candidate.stop)
                checker = self._start("checker", tests, limits, [link[1].fileno(), theirs])
                stack.callback(checker.stop)
                stack.callback(candidate.kill)  # first, so that both end at the same time
            finally:
                os.close(theirs)
                for end in link:
                    end.close()
            candidate.wait_until_started()
            checker.wait_until_started()
            return self._watch(ours, candidate, checker, limits, count)

    def _watch(self, reports: int, candidate: Guest, checker: Guest, limits: Limits, count: int) -> Report:
        found, decoder = Report(), Decoder()
        begun = since = time.monotonic()
        before, data = 0.0, b""
        while len(found.shares) < count:
            if select.select([reports], [], [], _TICK)[0]:
                data = os.read(reports, 1 << 16)
                if not data:
                    break
                for message in decoder.feed(data):
                    if "unusable" in message:
                        raise RewardError(f"the tests of this row can't be run: {message['unusable']}")
                    if "begin" in message:
                        since, before = time.monotonic(), candidate.cpu() + checker.cpu()
                    else:
                        found.add(message["passed"], message["note"])
            now, used = time.monotonic(), candidate.cpu() + checker.cpu()
            late = used - before > limits.test_seconds or now - since > PATIENCE * limits.test_seconds
            if late or used > limits.seconds or now - begun > PATIENCE * limits.seconds:
                found.timed_out = len(found.shares) < count
                break
        why = "out of time" if found.timed_out else "not reached"
        for _ in range(count - len(found.shares)):
            found.add(0.0, why)
        return found

    def run(
        self,
        code: Mapping[str, Any],
        inputs: Sequence[str],
        limits: Limits,
        accept: Callable[[int, str], str | None],
        stop: bool,
    ) -> Report:
        """Runs a program once an input. `accept(number, output)` says what is wrong with an output, or None. `stop`: at the first wrong one."""
        found, used, begun = Report(), 0.0, time.monotonic()
        for number, text in enumerate(inputs):
            left = min(limits.test_seconds, limits.seconds - used)
            wall = min(PATIENCE * limits.test_seconds, PATIENCE * limits.seconds - (time.monotonic() - begun))
            if min(left, wall) <= 0 or (stop and any(s < 1 for s in found.shares)):
                found.add(0.0, "not reached")
                continue
            output, problem, cpu = self._run_once(code, text, limits, left, wall)
            used += cpu
            found.timed_out |= problem == "out of time"
            problem = problem or accept(number, output)
            found.add(float(problem is None), problem or "")
        return found

    def _run_once(
        self, code: Mapping[str, Any], text: str, limits: Limits, cpu: float, wall: float
    ) -> tuple[str, str | None, float]:
        """What it printed, what went wrong, and the processor time."""
        ours, theirs = os.pipe()
        source = _memory_file(text.encode(errors="surrogatepass"))
        try:
            try:
                guest = self._start("program", code, limits, [source, theirs])
            finally:
                os.close(theirs)
                os.close(source)
            try:
                guest.wait_until_started()
                output, problem = self._read(ours, guest, limits.output_bytes, cpu, time.monotonic() + wall)
            finally:
                guest.stop()
        finally:
            os.close(ours)
        assert guest.ended is not None
        if problem is None and guest.ended["code"] != 0:
            problem = f"ended with code {guest.ended['code']}"
        return output.decode(errors="replace"), problem, guest.ended["cpu"]

    @staticmethod
    def _read(fd: int, guest: Guest, limit: int, cpu: float, until: float) -> tuple[bytes, str | None]:
        output = bytearray()
        while True:
            if select.select([fd], [], [], _TICK)[0]:
                part = os.read(fd, 1 << 16)
                if not part:  # closed, perhaps long before its end
                    break
                output += part
                if len(output) > limit:
                    return bytes(output[:limit]), f"printed more than {limit} bytes"
            if guest.cpu() > cpu or time.monotonic() > until:
                return bytes(output), "out of time"
        while guest.ended is None:
            guest.listen(_TICK)
            if guest.ended is None and (guest.cpu() > cpu or time.monotonic() > until):
                return bytes(output), "out of time"
        return bytes(output), None

    def _start(self, role: str, payload: Mapping[str, Any], limits: Limits, descriptors: Sequence[int]) -> Guest:
        body = _memory_file(json.dumps(payload).encode())
        ours, theirs = socket.socketpair()
        job = {"role": role, "cpu_seconds": int(limits.seconds) + 2, "memory_bytes": limits.memory_mb << 20}
        try:
            socket.send_fds(self._control, [json.dumps(job).encode()], [body, theirs.fileno(), *descriptors])
        except OSError:
            ours.close()
            raise BrokenPipeError("the sandbox's process is gone") from None
        finally:
            os.close(body)
            theirs.close()
        return Guest(ours)


def _memory_file(data: bytes) -> int:
    """A descriptor to read `data` from, which no path leads to."""
    fd = os.memfd_create("llmrl", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as handle:
        handle.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
