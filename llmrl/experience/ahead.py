"""The experience of later steps, made while the trainer trains on this one (one thread beside the main one)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llmrl.errors import LLMRLError
from llmrl.experience.collect import Experience, Gather

JOIN_SECONDS = 10.0
"""How long `close` waits for a step that is being made."""


class Ahead:
    """Makes the experience of steps `first_step` to `last_step`, in order, in a thread of its own.

    Weights of version v are those after v steps; rollouts of step s are strictly on policy with v = s - 1. Step s may begin once
    `allow(v)` was called with v >= s - 1 - max_staleness. So no token is staler than `max_staleness` versions when it is trained on,
    and at most max_staleness + 1 experiences exist: the one that is trained on, those that wait, and the one that is being made.

    `collect(step)` runs in the thread, and `cursor()` right after it: the state of what draws prompts, as JSON. Checkpoints must hold
    the cursor that `take` gave with the last step, for the sampler itself is ahead: a run resumed from it neither loses nor repeats
    a prompt.

    With several processes every one has its own `Ahead`, and `gather` (`Collectives.second_channel().gather_json`, as for all that
    `collect` does) lets them begin the same steps: when one ends its run or fails, the others' `take` raises instead of waiting.

    `closing` is set as soon as `close` is called: what takes long in `collect` may look at it.
    """

    def __init__(
        self,
        collect: Callable[[int], Experience],
        *,
        max_staleness: int,
        first_step: int,
        last_step: int,
        cursor: Callable[[], dict[str, Any]],
        gather: Gather | None = None,
    ) -> None:
        if max_staleness < 1:
            raise ValueError(f"max_staleness {max_staleness} leaves nothing to make ahead; call collect itself")
        self.collect, self.cursor = collect, cursor
        self.max_staleness, self.first_step, self.last_step = max_staleness, first_step, last_step
        self.closing = threading.Event()
        self._gather: Gather = gather or (lambda value: [value])
        self._changed = threading.Condition()
        self._version = first_step - 2 - max_staleness  # with which no step may begin
        self._next = first_step
        self._made: deque[tuple[Experience, dict[str, Any]]] = deque()
        self._error: BaseException | None = None
        # A daemon: a request that never ends must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="rollouts-ahead", daemon=True)
        self._thread.start()

    def allow(self, version: int) -> None:
        """The engine samples with weights of `version` now; lets the steps begin that may."""
        with self._changed:
            self._version = max(self._version, version)
            self._changed.notify_all()

    def take(self, step: int) -> tuple[Experience, dict[str, Any]]:
        """The experience of `step`, the one after the last taken, and the cursor behind its prompts. Waits until it is made.

        Its metrics say how many seconds it took (`rollout/making_seconds`). What the thread raised in making this step is raised here,
        the same object; steps that were made before it are still given.
        """
        with self._changed:
            if step != self._next or step > self.last_step:
                raise ValueError(f"step {step} is not the next one, {self._next} (the last is {self.last_step})")
            if self._version < step - 1 - self.max_staleness:
                raise ValueError(
                    f"step {step} may not begin with weights {self._version}: it would be waited for forever"
                )
            self._changed.wait_for(lambda: self._made or self._error is not None)
            if not self._made:
                assert self._error is not None
                raise self._error
            self._next += 1
            return self._made.popleft()

    def close(self) -> None:
        """Ends the thread before its next step and waits for it, `JOIN_SECONDS` at most. May be called twice, and whatever happened."""
        self.closing.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        try:
            for step in range(self.first_step, self.last_step + 1):
                self._begin(step)
                began = time.monotonic()
                experience = self.collect(step)
                seconds = {"rollout/making_seconds": time.monotonic() - began}
                made = replace(experience, metrics={**experience.metrics, **seconds}), self.cursor()
                with self._changed:
                    self._made.append(made)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _begin(self, step: int) -> None:
        """Waits until `step` may begin on every process. Raises LLMRLError where it will not, because a process ended its run."""
        with self._changed:
            self._changed.wait_for(lambda: self._version >= step - 1 - self.max_staleness or self.closing.is_set())
        # Agreed on, so that no process waits in `collect` for one that has left.
        ended = [rank for rank, closing in enumerate(self._gather(self.closing.is_set())) if closing]
        if ended:
            raise LLMRLError(
                f"there are no rollouts for step {step}: the run ended on process {', '.join(map(str, ended))}, whose log says why"
            )
