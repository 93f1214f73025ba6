"""Where each process stands, so that when one dies or hangs the others say which one, where it was, and end.

Every process notes its place ("step 7, update 13, microbatch 3/8") in memory, which costs nothing. One thread a process publishes it
through the process group's store a few times a second, and reads the others'. Nothing but that thread talks to the store: a store whose
host hangs never answers, and the training thread must not wait for it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llmrl.errors import LostProcessError

TICK = 0.25
"""Seconds between two looks at the others; longer with more than 64 processes, so that the store's load stays the same."""
GRACE = 10.0
"""Seconds that a process has to end by itself, with its records written, before its watching thread ends it."""
SILENCE = 300.0
"""Seconds without a sign of life after which a process of another machine counts as lost."""
STORE_TIMEOUT = 30.0
"""Seconds that the store has for an answer; it is held by rank 0, or by the launcher."""
_TRANSPORT = re.compile(r"gloo/|NCCL|nccl|monitoredBarrier|Connection (closed|reset) by peer")
_TROUBLE = "trouble"


@dataclass(frozen=True)
class Trouble:
    """The process that was lost first, and how."""

    rank: int | None
    what: str


@dataclass
class _Peer:
    """What another process published last, and when (`time.monotonic` of this one)."""

    raw: bytes = b""
    news: float = 0.0

    @property
    def entry(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.raw) if self.raw else {}
        return found


class Standing:
    """The place of this process, and what is known of the others'.

    timeout: seconds that a process waits for the others in one place. Without `watch` (one process, tests) nothing is published.
    `saved_step` is that of the newest checkpoint, for messages. `guarding`: a run is under way, and this process ends when another is lost.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, timeout: float = 3600.0) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.saved_step: int | None = None
        self.guarding = False
        self.trouble: Trouble | None = None
        self._step = 0
        self._began = time.monotonic()
        self._places: dict[str, list[str]] = {}
        self._moved: dict[str, float] = {}
        self._waiting: set[str] = set()  # threads that wait for other processes
        self._patient = 0  # in something that is worth finishing without the others
        self._ended: str | None = None
        self._published = threading.Event()
        self._looked = threading.Condition()
        self._looks = 0
        self._wake = threading.Event()
        self._peers = {r: _Peer() for r in range(world_size) if r != rank}
        self._thread: threading.Thread | None = None
        self._lost_at: float | None = None
        self._store: Any = None
        self._deaf = False  # the store did not answer: nothing is asked any more
        self._heard = time.monotonic()  # when it last did

    def at(self, place: str) -> None:
        """Notes where this thread stands, in place of where it stood. Raises LostProcessError when another process is known to be lost."""
        self._note(place, replace=True)
        self._raise_if_lost()

    def begin_step(self, step: int) -> None:
        self._step = step
        self._note("", replace=True)

    @contextmanager
    def during(self, place: str, *, waits: bool = False, patient: bool = False) -> Iterator[None]:
        """Notes that this thread is in `place` until the block ends; what `at` notes inside comes after it.

        waits: nothing takes longer than `timeout` here, unless another process does not come. patient: the block is worth finishing
        when another process is lost (a checkpoint that is being written). An error of the transport becomes a LostProcessError.
        """
        self._raise_if_lost()
        name = _thread_name()
        stack = self._places.setdefault(name, [""])
        depth, waited = len(stack), name in self._waiting
        self._note(place, replace=False)
        stack.append("")
        self._patient += patient
        if waits:
            self._waiting.add(name)
        try:
            yield
        except RuntimeError as error:
            if (lost := self.explain(error)) is None:
                raise
            raise lost from error
        finally:
            self._patient -= patient
            del stack[depth:]
            self._moved[name] = time.monotonic()
            if not waited:
                self._waiting.discard(name)

    def explain(self, error: BaseException) -> LostProcessError | None:
        """The error of a collective, as one that says where every process stands; None for any other error.

        Waits up to three seconds to hear what became of the others.
        """
        if self.world_size == 1 or not isinstance(error, RuntimeError):
            return None
        if not isinstance(error, dist.DistError) and not _TRANSPORT.search(str(error)):
            return None
        self._wait_for_news()
        if self.trouble is None and self._thread is not None:
            self._suspect()
        return self._lost(re.sub(r"^\[\S+\] |\. This is typically.*", "", str(error).strip().splitlines()[0]))

    def watch(self, store: Any) -> None:
        """Begins to publish this process's place in `store`, and to look at the others' (all processes must do it)."""
        global _watching
        if _watching is not None:
            _watching.end(None)
        _watching = self
        # A store of its own: what waits in one blocks whoever else uses the same object.
        self._store = dist.PrefixStore(f"standing/{_next_number()}", store.clone())
        self._store.set_timeout(timedelta(seconds=min(STORE_TIMEOUT, self.timeout)))
        self._thread = threading.Thread(target=self._watch, name="standing", daemon=True)
        self._thread.start()
        atexit.register(self.end, None)

    def end(self, error: BaseException | None) -> None:
        """Tells the others that this process ends its run, or that it fails with `error`, and stops watching. May be called twice."""
        self.guarding = False
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if isinstance(error, Exception | KeyboardInterrupt):
            text = str(error).strip().partition("\n")[0].partition(", so rank ")[0]
            self._ended = f"{type(error).__name__}: {text}"
        else:
            self._ended = ""
        self._wake.set()
        self._published.wait(2 * TICK)
        if self._ended and self.rank == 0:
            time.sleep(2 * self._tick)  # the store may end with this process: the others must have read why

    # --- what is noted ---

    def _note(self, place: str, replace: bool) -> None:
        name = _thread_name()
        stack = self._places.setdefault(name, [""])
        if replace:
            stack[-1] = place
        else:
            stack.append(place)
        self._moved[name] = time.monotonic()

    def places(self) -> list[tuple[str, float, bool]]:
        """(place, seconds there, waiting for others) of this process: of the main thread first, then of those beside it."""
        now = time.monotonic()
        found = []
        for name, stack in sorted(self._places.copy().items()):  # other threads add theirs
            text = ", ".join(([f"step {self._step}"] if self._step and not name else []) + [p for p in stack if p])
            if text:
                seconds = round(now - self._moved.get(name, now), 1)
                found.append((f"{name}: {text}" if name else text, seconds, name in self._waiting))
        return found or [("starting", round(now - self._began, 1), False)]

    # --- the watching thread ---

    @property
    def _tick(self) -> float:
        return TICK * max(1.0, self.world_size / 64)

    def _watch(self) -> None:
        beat = 0
        while True:
            self._wake.wait(self._tick)
            beat += 1
            ended = self._ended
            try:
                if not self._deaf:
                    self._publish(beat)
                    self._look()
                    self._heard = time.monotonic()
            except RuntimeError as error:
                self._deaf = True  # what it would answer later might be taken for the answer to something else
                if self._ended is None and self.trouble is None and "time" not in str(error):
                    self.trouble = self._gone() or Trouble(
                        self._store_rank, "is gone, and with it the processes' store"
                    )
            with self._looked:
                self._looks += 1
                self._looked.notify_all()
            if ended is not None:
                self._published.set()
                return
            if self.guarding:
                self._end_if_stuck()

    def _publish(self, beat: int) -> None:
        entry = {
            "pid": os.getpid(), "machine": _machine(), "beat": beat, "places": self.places(), "code": _code_of_main_thread(),
            "ended": self._ended,
        }  # fmt: skip
        self._store.set(str(self.rank), json.dumps(entry))
        if self._ended and self.trouble is None:
            self.trouble = Trouble(self.rank, f"failed with {self._ended}")

    def _look(self) -> None:
        here = [rank for rank, peer in self._peers.items() if peer.raw or self._store.check([str(rank)])]
        for rank, raw in zip(here, self._store.multi_get([str(rank) for rank in here]) if here else []):
            peer = self._peers[rank]
            if raw != peer.raw:
                peer.raw, peer.news = raw, time.monotonic()
        if self._store.check([_TROUBLE]):
            self.trouble = Trouble(*json.loads(self._store.get(_TROUBLE)))
        elif (trouble := self.trouble or self._gone()) is not None:
            # The first report stands: what is lost after it is lost because of it.
            first = self._store.compare_set(_TROUBLE, "", json.dumps([trouble.rank, trouble.what]))
            self.trouble = Trouble(*json.loads(first))

    def _gone(self) -> Trouble | None:
        """A process that can't come any more."""
        for rank, peer in self._peers.items():
            entry = peer.entry
            if not entry or entry["ended"] is not None:
                continue
            if entry["machine"] == _machine() and not _alive(entry["pid"]):
                return Trouble(rank, f"died (process {entry['pid']} is gone)")
            if self._silent(peer) > SILENCE:
                return Trouble(rank, f"gave no sign of life for {SILENCE:.0f} s")
        return None

    @property
    def _store_rank(self) -> int | None:
        """Who holds the store: None for the launcher (torchrun, accelerate launch)."""
        return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0

    def _end_if_stuck(self) -> None:
        """Ends this process when it does not do so by itself: its collective may hang for ever, or its sampling for long."""
        waited = max((seconds for _, seconds, waits in self.places() if waits), default=0.0)
        overdue = waited > self.timeout + GRACE  # before, the transport may say so itself
        if self.trouble is None:
            if not overdue:
                return
            self._suspect()
        self._lost_at = self._lost_at or time.monotonic()
        if not overdue and (self._patient or time.monotonic() - self._lost_at < GRACE):
            return
        sys.stderr.write(f"llmrl: error (process {self.rank}): {self._lost('ended by its watching thread')}\n")
        sys.stderr.flush()
        os._exit(2)

    # --- what is said ---

    def _wait_for_news(self) -> None:
        """Until the watching thread knows who is lost, or has looked at everyone twice more; three seconds at most."""
        deadline = time.monotonic() + 3.0
        with self._looked:
            until = self._looks + 3
            while self._thread is not None and self.trouble is None and self._looks < until:
                if not self._looked.wait(deadline - time.monotonic()):
                    return

    def _suspect(self) -> None:
        """Nobody is known to be gone: late is who stands where it does not wait for others, or whose code does not while this one's does."""
        here = _code_of_main_thread()
        if time.monotonic() - self._heard > 3 * self._tick:
            self.trouble = Trouble(
                self._store_rank, "gives no sign of life: the processes' store, which it holds, does not answer"
            )
            return
        ended = [rank for rank, peer in self._peers.items() if peer.entry.get("ended") is not None]
        silent = [rank for rank, peer in self._peers.items() if self._silent(peer) > 3 * self._tick]
        late = [rank for rank, peer in self._peers.items() if not any(waits for *_, waits in _places(peer.entry))]
        busy = [rank for rank, peer in self._peers.items() if not _in_transport(peer.entry.get("code", ""), here)]
        for rank in [*ended, *silent, *late, *busy][:1]:
            what = "ended its run" if ended else "gives no sign of life" if silent else "did not come in time"
            self.trouble = Trouble(rank, what)

    def _silent(self, peer: _Peer) -> float:
        """Seconds without news from a process, while the store did answer."""
        return self._heard - peer.news

    def _raise_if_lost(self) -> None:
        if self.trouble is not None and self.trouble.rank != self.rank:
            raise self._lost("noticed between two collectives")

    def _lost(self, cause: str) -> LostProcessError:
        trouble = self.trouble
        if trouble is None:
            who = "another process died or hangs"
        elif trouble.rank == self.rank:
            who = f"this process, rank {self.rank}, {trouble.what}"
        else:
            who = f"{'the launcher' if trouble.rank is None else f'rank {trouble.rank}'} {trouble.what}"
        lines = [f"{who}, so rank {self.rank} of {self.world_size} can't go on ({cause}). Where each one stands:"]
        lines.append(f"  rank {self.rank} (this one): {_described(self.places())}, in {_code_of_main_thread()}")
        alike: dict[str, list[str]] = {}
        for rank, peer in self._peers.items():
            alike.setdefault(self._description(rank, peer), []).append(str(rank))
        lines += [f"  rank {', '.join(ranks)}: {text}" for text, ranks in alike.items()]
        lines.append(f"{_advice(self.saved_step)} The log of the lost process may say more")
        return LostProcessError("\n".join(lines))

    def _description(self, rank: int, peer: _Peer) -> str:
        entry = peer.entry
        if not entry:
            return "never said where it stands"
        silent, ago = self._silent(peer), time.monotonic() - peer.news
        if entry["ended"] is not None:
            return f"ended {ago:.0f} s ago{': ' * bool(entry['ended'])}{entry['ended']}"
        if entry["machine"] == _machine() and not _alive(entry["pid"]):
            state = "gone, last at"
        elif silent > 3 * self._tick:
            state = f"no sign of life for {silent:.0f} s, last at"
        else:
            state = "alive, at" if ago < 3 * self._tick else f"heard of {ago:.0f} s ago, at"
        return f"{state}: {_described_entry(entry)}"


_watching: Standing | None = None
_number = 0


def _next_number() -> int:
    """Every process makes its backends in the same order: the number tells one's entries in the store from another's."""
    global _number
    _number += 1
    return _number


def _thread_name() -> str:
    thread = threading.current_thread()
    return "" if thread is threading.main_thread() else thread.name


def _places(entry: dict[str, Any]) -> Sequence[Any]:
    return entry.get("places") or [("an unknown place", 0.0, False)]


def _described(places: Sequence[Any]) -> str:
    return "; ".join(f"{place} (for {seconds:.0f} s)" for place, seconds, _ in places)


def _described_entry(entry: dict[str, Any]) -> str:
    return f"{_described(_places(entry))}, in {entry.get('code', 'unknown code')}"


def _code_of_main_thread() -> str:
    """The Python code that the main thread runs, or whose call into C has not come back: `torch.autograd.graph, line 870`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "threading", "contextlib"):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}, line {frame.f_lineno}" if frame else "no code"


def _in_transport(code: str, here: str) -> bool:
    """Whether code is where processes wait for each other: in torch (a collective, a backward), or where this one waits."""
    return code.startswith("torch.") or code == here


def _advice(saved_step: int | None) -> str:
    if saved_step is None:
        return "No checkpoint was saved yet: the same command begins anew (save_steps says how often one is)."
    return f"The same command continues from the checkpoint of step {saved_step}."


def _alive(pid: int) -> bool:
    """Whether a process of this machine still runs; one that waits for its parent to notice its end does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return _signalable(pid) if not Path("/proc/self").exists() else False
    return state not in ("Z", "X")


def _signalable(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _machine() -> str:
    """Process numbers mean the same where this does: a host, started once, and one namespace of processes on it."""
    global _this_machine
    if not _this_machine:
        try:
            namespace = str(os.stat("/proc/self/ns/pid").st_ino)
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            namespace = boot = ""
        _this_machine = f"{socket.gethostname()} {boot} {namespace}"
    return _this_machine


_this_machine = ""
