"""The generation servers of one training process: which of them are up, which takes the next request, and how a lost one comes back."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.errors import ConfigError, RolloutError, SyncError
from llmrl.rollout.vllm_answers import Weights
from llmrl.rollout.vllm_client import (
    ServerError,
    ServerFault,
    ServerGone,
    ServerRefused,
    ServerSilent,
    VLLMServer,
)

logger = logging.getLogger("llmrl")

Progress = Callable[[str], None]

_POLL = 2.0
"""Seconds between two looks at a server that is not up, or that another process may have lost."""
_PATIENCE = 10.0
"""Seconds that a server which was up may take to say so: it may be busy."""
_PROGRESS = 15.0
"""Seconds between two lines of progress."""
_REST, _LONGEST_REST = 0.5, 30.0
"""Seconds that a server rests after a fault; doubled with each further fault in a row."""
_WATCH = 3.0
"""Seconds between two looks at servers that have calls in flight."""
_STRIKES = 2
"""Looks in a row that must find no listening server: one alone may be a fault of the network."""
_SILENCE = 300.0
"""Seconds without any answer after which a server that still takes connections counts as gone."""


@dataclass
class Member:
    """A server with what is known of it. `outstanding` are the tokens of its requests in flight, were all to reach their limit."""

    server: VLLMServer
    up: bool = False
    resend: bool = False
    in_flight: int = 0
    outstanding: int = 0
    faults: int = 0
    check_at: float = 0.0
    reason: str = ""
    strikes: int = 0
    silent_since: float | None = None

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def fault(self) -> str:
        """Its address and what it did wrong last."""
        return self.reason.rstrip(".") or f"{self.url}: it does not answer"


class Fleet:
    """Threads may share it. A server that fails leaves the rotation; a thread of its own looks after it and takes it back when it is up,
    is the same model, and holds the weights of the last sync: by its label, or because `resend` sent them again. Another thread looks
    at servers that have calls in flight: one that is being stopped keeps its connections open, and would never answer.

    model: what servers must have in common with the trainer's (model_type, vocab_size, hidden_size, num_hidden_layers).
    transfer: the weight transfer's backend. watch: also look at servers that are up, for processes that can't resend.
    """

    def __init__(
        self,
        servers: Sequence[VLLMServer],
        *,
        model: Mapping[str, Any],
        transfer: str,
        max_concurrency: int,
        start_timeout: float,
        rank: int,
        watch: bool,
        progress: Progress,
    ) -> None:
        self.members = [Member(server) for server in servers]
        self.descriptions: dict[str, dict[str, Any]] = {}
        self.weights = Weights()
        self.resend: Callable[[VLLMServer], None] | None = None
        self.exclusive = threading.Lock()
        """Held while weights are sent, so that a sync and a resend do not meet on a server."""
        self._model, self._transfer, self._limit = model, transfer, max_concurrency
        self._start_timeout, self._rank, self._watch, self._progress = start_timeout, rank, watch, progress
        self._change = threading.Condition()
        self._fatal: Exception | None = None
        self._none_since: float | None = None
        self._told = 0.0
        self._closed = False
        self._keeper: threading.Thread | None = None
        self.counts: Counter[str] = Counter()

    # -- start

    def wait_for_all(self) -> None:
        """Returns when every server is up and fits. Raises ServerRefused or ConfigError at once for one that can't be used, RolloutError
        for those that are not up after `start_timeout` seconds."""
        began = time.monotonic()
        while True:
            for member in self.members:
                if not member.up:
                    member.up = self._answers(member)
            missing = [m for m in self.members if not m.up]
            waited = time.monotonic() - began
            if not missing:
                break
            if waited > self._start_timeout:
                raise RolloutError(
                    f"{_list(missing)} did not come up in {self._start_timeout:g} s (rollout.start_timeout). Start them with `llmrl serve "
                    "--model M`, see that rollout.urls has their addresses, and run the same command again."
                )
            self._tell(f"waiting for {_list(missing)}: {waited:.0f} s of {self._start_timeout:.0f} s")
            time.sleep(min(_POLL, self._start_timeout / 10))
        threading.Thread(target=self._guard, name="llmrl-guard", daemon=True).start()
        if self._watch:
            self._look_after()

    def _answers(self, member: Member) -> bool:
        """Whether it is up; raises ConfigError when it is and can't be used."""
        try:
            member.server.check()
        except (ServerGone, ServerFault) as error:
            member.reason = str(error)
            return False
        try:
            self._check(member.url, member.server.describe())
        except ServerGone as error:
            member.reason = str(error)
            return False
        return True

    def _check(self, url: str, described: dict[str, Any]) -> None:
        wrong = {k: (described.get(k), v) for k, v in self._model.items() if described.get(k) != v}
        if wrong:
            listed = ", ".join(f"{k} {theirs}, not {ours}" for k, (theirs, ours) in wrong.items())
            raise ConfigError(
                f"{url} serves another model than the one that is trained: {listed}. Start it with the recipe's own `model`."
            )
        if described.get("logprobs_mode") != "processed_logprobs":
            raise ConfigError(
                f"{url} gives {described.get('logprobs_mode')}: log-probs before the temperature, which training can't use. Start it with "
                "`llmrl serve`, or with --logprobs-mode processed_logprobs."
            )
        if described.get("weight_transfer") != self._transfer:
            raise ConfigError(
                f"{url} takes weights by {described.get('weight_transfer')}, and rollout.transfer is {self._transfer}. Start it with "
                f"`llmrl serve --transfer {self._transfer}`, or change the recipe."
            )
        self.descriptions[url] = described

    # -- rotation

    def take(self, tokens: int, avoid: Member | None = None) -> Member | None:
        """The server with the fewest outstanding tokens that has room for one more request, `avoid` only where no other is up; None
        when all are busy or away. Equals are taken in an order that starts at another server in each process."""
        with self._change:
            up = [m for m in self.members if m.up]
            free = [m for m in up if m.in_flight < self._limit and (m is not avoid or len(up) == 1)]
            if not free:
                return None
            n = len(self.members)
            member = min(free, key=lambda m: (m.outstanding, (self.members.index(m) - self._rank) % n))
            member.in_flight += 1
            member.outstanding += tokens
            return member

    def give_back(self, member: Member, tokens: int, *, good: bool) -> None:
        with self._change:
            member.in_flight -= 1
            member.outstanding -= tokens
            if good:
                member.faults = 0

    def lost(self, member: Member, error: Exception) -> None:
        """Takes a server out of the rotation, until it answers and holds the current weights."""
        with self._change:
            self.counts["server_faults"] += 1
            member.reason = str(error)
            if not member.up:
                return  # other requests to it failed at the same time
            member.up = False
            member.faults += 1
            rest = min(_REST * 2 ** (member.faults - 1), _LONGEST_REST)
            member.check_at = time.monotonic() + rest
            logger.warning("%s; it leaves the rotation until it answers and holds the current weights", error)
            if not any(m.up for m in self.members):
                self._none_since, self._told = time.monotonic(), 0.0
            self._look_after()
            self._change.notify_all()

    def up(self) -> list[Member]:
        with self._change:
            return [m for m in self.members if m.up]

    def check(self) -> None:
        """Raises what the fleet can't recover from; tells how long it has waited while no server is up."""
        with self._change:
            if self._closed:
                raise RolloutError("the engine was closed while it was waiting for servers")
            if self._fatal is not None:
                raise self._fatal
            if self._none_since is None:
                return
            waited = time.monotonic() - self._none_since
            message = "; ".join(m.fault for m in self.members)
        if waited > self._start_timeout:
            raise RolloutError(
                f"No generation server came back in {self._start_timeout:g} s (rollout.start_timeout): {message}. Start the servers again; "
                "the same command then continues from the last checkpoint."
            )
        self._tell(f"no generation server is up, {waited:.0f} s of {self._start_timeout:.0f} s: {message}")

    def wait_for_one(self) -> None:
        """Returns when a server is up; raises as `check` does."""
        while not self.up():
            self.check()
            with self._change:
                self._change.wait(0.1)

    # -- syncs

    def reachable(self) -> list[Member]:
        """The servers that answer now, at least one; those that had gone are looked at as at the start. Raises as `check` does."""
        while True:
            found = []
            for member in self.members:
                try:
                    if not member.up and not self._answers(member):
                        continue
                    member.server.check(_PATIENCE)
                    found.append(member)
                except (ServerGone, ServerFault) as error:
                    member.reason = str(error)
            if found:
                return found
            with self._change:
                if self._none_since is None:
                    self._none_since, self._told = time.monotonic(), 0.0
            self.check()
            time.sleep(min(_POLL, self._start_timeout / 10))

    def synced(self, weights: Weights, urls: Sequence[str]) -> None:
        """The servers of `urls` hold these weights; others are not used until they do, too."""
        with self._change:
            self.weights, self._fatal = weights, None
            for member in self.members:
                if member.url in urls:
                    member.up, member.resend, self._none_since = True, False, None
                    continue
                member.resend = True
                if member.up:
                    member.up, member.reason = False, f"{member.url}: it missed the sync of {weights.label}"
            if not any(m.up for m in self.members) and self._none_since is None:
                self._none_since, self._told = time.monotonic(), 0.0
            self._look_after()
            self._change.notify_all()

    # -- calls in flight

    def _guard(self) -> None:
        while not self._closed:
            for member in self.members:
                if not member.server.is_asked:
                    member.strikes, member.silent_since = 0, None
                elif (reason := self._given_up(member)) is not None:
                    if member.up:
                        self.lost(member, ServerGone(member.url, reason))
                    member.server.hang_up()
            with self._change:
                self._change.wait_for(lambda: self._closed, _WATCH)

    def _given_up(self, member: Member) -> str | None:
        """Why calls in flight to this server will not be answered; None while they may be."""
        now = time.monotonic()
        try:
            member.server.check(_PATIENCE)
        except ServerSilent:
            member.strikes, member.silent_since = 0, member.silent_since or now
            if time.monotonic() - member.silent_since > _SILENCE:
                return f"it takes connections and has not answered for {_SILENCE:g} s, not even /health"
            return None
        except ServerGone as error:
            member.strikes += 1
            return f"it takes no more connections ({error})" if member.strikes >= _STRIKES else None
        except ServerError:
            pass  # it answers
        member.strikes, member.silent_since = 0, None
        return None

    # -- recovery

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        for member in self.members:
            member.server.close()

    def _look_after(self) -> None:
        """Starts the thread that looks after lost servers; called with `_change` held or before other threads exist."""
        if self._keeper is None or not self._keeper.is_alive():
            self._keeper = threading.Thread(target=self._keep, name="llmrl-servers", daemon=True)
            self._keeper.start()

    def _keep(self) -> None:
        while True:
            with self._change:
                down = [m for m in self.members if not m.up]
                if self._closed or self._fatal is not None or not (down or self._watch):
                    self._keeper = None
                    return
                now = time.monotonic()
                due = [m for m in self.members if m.check_at <= now and (self._watch or not m.up)]
                if not due:
                    self._change.wait(max(0.01, min(m.check_at for m in (self.members if self._watch else down)) - now))
                    continue
            for member in due:
                try:
                    self._revive(member) if not member.up else self._watch_over(member)
                except (ServerGone, ServerFault) as error:
                    member.reason = str(error)
                except Exception as error:
                    if isinstance(error, SyncError) and self.up():  # the transfer can't send again before the next sync
                        member.reason = str(error)
                    else:
                        self._fatal = error
                member.check_at = time.monotonic() + _POLL

    def _revive(self, member: Member) -> None:
        if not self._answers(member):
            return
        with self.exclusive:
            label = self.weights.label
            missing = not self.weights.held_under(member.server.weight_label())
            if self.resend is None and missing:
                member.reason = f"{member.url}: it is up, without the weights of {label} yet"
                return
            if self.resend is not None and (missing or member.resend):
                self._progress(f"{member.url} is up again: sending it the weights of {label}")
                self.resend(member.server)
            with self._change:
                member.up, member.resend, self._none_since = True, False, None
                self._change.notify_all()
        self._progress(f"{member.url} takes requests again")

    def _watch_over(self, member: Member) -> None:
        """Notices that a server restarted although this process did not use it meanwhile."""
        with self.exclusive:
            try:
                if not self.weights.held_under(member.server.weight_label()):
                    raise ServerGone(
                        member.url, f"it no longer holds the weights of {self.weights.label}: it was restarted"
                    )
            except ServerRefused:
                raise
            except ServerError as error:
                self.lost(member, error)

    def _tell(self, message: str) -> None:
        now = time.monotonic()
        if now - self._told >= _PROGRESS or not self._told:
            self._told = now
            self._progress(message)


def _list(members: Sequence[Member]) -> str:
    return ", ".join(m.url for m in members)
