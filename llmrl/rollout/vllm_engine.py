"""Rollouts from one or many generation servers: groups are spread over them, answers are checked, and faults survived."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from llmrl.config.rollout import RolloutSettings
from llmrl.errors import RolloutError, together
from llmrl.rollout.vllm_answers import Answer, Reader, Weights, check_request, request_body
from llmrl.rollout.vllm_client import ServerError, ServerFault, ServerGone, ServerRefused, VLLMServer, find_token
from llmrl.rollout.vllm_fleet import Fleet, Member
from llmrl.types import Completion, FinishReason, OnGroup, PolicyWeights, Prompt, Rollout, Sampling, SyncReport

logger = logging.getLogger("llmrl")

_FAULTS = 3
"""Faults of one group that are survived; with one more the call fails."""
_TICK = 0.1
"""Seconds between two looks at servers that may have come back, and at a Ctrl-C."""
_SPARE = 8
"""Connections beside those that generate, for syncs and checks."""


@dataclass
class _Task:
    """A group to be sampled; `last` is the server that failed at it."""

    place: int
    prompt: Prompt
    tokens: int
    faults: list[str]
    last: Member | None = None


class VLLMServerEngine:
    """Samples with servers that `llmrl serve` started (`RolloutEngine`).

    model: model_type, vocab_size, hidden_size and num_hidden_layers of the trainer's model, which the servers' must equal.
    output_dir: where weights are written for servers on other machines. gather: a JSON value from every process, to all of them.
    progress: is told what is waited for. Waits for servers that are not up, up to rollout.start_timeout.
    Raises ConfigError for servers that can't serve this model, ServerRefused for a wrong token, RolloutError for servers that stay away.

    Example: engine.sync_weights(weights, 1); engine.generate([prompt], 8, Sampling(max_tokens=64)); engine.verify()
    """

    def __init__(
        self,
        settings: RolloutSettings,
        tokenizer: Any,
        *,
        stop_token_ids: Iterable[int],
        model: Mapping[str, Any],
        output_dir: Path,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        progress: Callable[[str], None] = logger.info,
    ) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.stop_token_ids = frozenset(stop_token_ids)
        self.vocab_size = int(model["vocab_size"])
        self.output_dir, self.rank, self._gather = Path(output_dir), rank, gather
        self._weights = Weights()
        self._transfer: Any = None
        self._numbers = count()
        self._resent = 0
        self.run_id: str = gather(secrets.token_hex(4))[0]
        self._fleet = together(lambda: self._open(model, world_size, progress), gather)
        described = self._fleet.descriptions
        self.max_model_len = min(int(d["max_model_len"]) for d in described.values())
        self.dtype: torch.dtype | None = getattr(torch, str(described[self._fleet.members[0].url]["dtype"]), None)

    def _open(self, model: Mapping[str, Any], world_size: int, progress: Callable[[str], None]) -> Fleet:
        settings = self.settings
        connections = settings.max_concurrency + _SPARE
        tokens = {u: partial(find_token, u, settings.token_file) for u in settings.urls}
        servers = [VLLMServer(u, token(), connections=connections, renew=token) for u, token in tokens.items()]
        fleet = Fleet(
            servers,
            model=model,
            transfer=settings.transfer,
            max_concurrency=settings.max_concurrency,
            start_timeout=settings.start_timeout,
            rank=self.rank,
            watch=self.rank == 0 and world_size > 1,
            progress=progress,
        )
        try:
            fleet.wait_for_all()
        except BaseException:
            fleet.close()
            raise
        return fleet

    @property
    def version(self) -> int:
        """The weight version that new requests are sampled with."""
        return self._weights.version

    # -- generation

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        """One group of `num_generations` rollouts a prompt, in the order of `prompts`; `on_group` is called as groups finish, from here.

        Requests that fail are sent again, to another server where there is one. Weights may be synced meanwhile, from another thread.
        The same prompt id, seed and step give the same completions of the same weights (up to the rounding of batched logits).
        Raises RolloutError for prompts that can't be continued, for a group that failed too often and when no server comes back, SyncError
        for completions of other weights than the last sync's, and what `on_group` raises; requests in flight are then aborted.
        """
        self._check(prompts, num_generations, sampling)
        call = _Call(self, num_generations, sampling)
        waiting = deque(
            _Task(i, p, len(p.ids) + num_generations * sampling.max_tokens, []) for i, p in enumerate(prompts)
        )
        groups: dict[int, list[Rollout]] = {}
        try:
            while len(groups) < len(prompts):
                self._start(call, waiting)
                try:
                    task, result = call.results.get(timeout=_TICK)
                except Empty:
                    self._fleet.check()
                    continue
                if isinstance(result, BaseException):
                    self._failed(task, result)
                    waiting.appendleft(task)
                    continue
                groups[task.place] = self._rollouts(task.prompt, result, num_generations)
                if on_group is not None:
                    on_group(task.place, groups[task.place])
        except BaseException:
            call.abort()
            raise
        return [groups[i] for i in range(len(prompts))]

    def _start(self, call: _Call, waiting: deque[_Task]) -> None:
        """Sends what servers have room for, in order."""
        held = []  # they may not go where they failed, and the others are busy
        while waiting:
            task = waiting.popleft()
            member = self._fleet.take(task.tokens, task.last)
            if member is not None:
                call.send(task, member)
                continue
            held.append(task)
            if task.last is None:
                break
        waiting.extendleft(reversed(held))

    def _failed(self, task: _Task, error: BaseException) -> None:
        if not isinstance(error, ServerGone | ServerFault):
            raise error
        task.faults.append(str(error))
        if len(task.faults) > _FAULTS:
            raise RolloutError(
                f"The group of prompt {task.prompt.id!r} failed {len(task.faults)} times: {'; '.join(task.faults)}. See what the servers "
                "say in their logs; the same command then continues from the last checkpoint."
            ) from error
        self._resent += 1

    def _check(self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling) -> None:
        larger = "Start the servers with a larger --max-model-len"
        sizes = {"max_model_len": self.max_model_len, "vocab_size": self.vocab_size}
        check_request(prompts, num_generations, sampling, remedy=larger, **sizes)

    def _ask(self, server: VLLMServer, request_id: str, prompt: Prompt, n: int, sampling: Sampling) -> list[Answer]:
        """The checked answers of one request; a greedy group is one completion, repeated: vLLM refuses to sample it more than once."""
        n = n if sampling.temperature > 0 else 1
        weights = self._weights
        body = request_body(request_id, prompt, n, sampling, self.stop_token_ids, weights)
        reader = Reader(server.url, self.run_id, weights, n, sampling.max_tokens, self.stop_token_ids, self.vocab_size)
        return reader.read(server.generate(body, self.settings.request_timeout))

    def _rollouts(self, prompt: Prompt, answers: list[Answer], num_generations: int) -> list[Rollout]:
        bodies = [list(a.ids[:-1] if a.stopped else a.ids) for a in answers]
        completions = []
        for answer, text in zip(answers, self.tokenizer.batch_decode(bodies, skip_special_tokens=True)):
            versions = answer.versions if max(answer.versions) > answer.version else ()
            reason: FinishReason = "stop" if answer.stopped else "length"
            completions.append(Completion(answer.ids, answer.logprobs, reason, text, answer.version, versions))
        if len(completions) == 1:
            completions *= num_generations
        return [Rollout(prompt, completion, i) for i, completion in enumerate(completions)]

    # -- weights

    def sync_weights(self, weights: PolicyWeights, version: int) -> SyncReport:
        """Sends the weights to every server that answers, from the first process; those that fail get them when they are back.

        Raises on all processes: SyncError when a server does not hold what it was sent, RolloutError when none can be reached.
        """
        from llmrl.rollout.weight_sync import make_transfer

        fleet, sender = self._fleet, self.rank == 0
        label = f"{self.run_id}:{version}"
        if self._transfer is None:
            # The same on every process, whichever server it met first; adapters only where all servers take them.
            described = fleet.descriptions[fleet.members[0].url]
            described = {
                **described,
                "max_lora_rank": min(d.get("max_lora_rank") or 0 for d in fleet.descriptions.values()),
            }
            servers = [m.server for m in fleet.members]
            self._transfer = together(
                lambda: make_transfer(
                    self.settings,
                    servers,
                    run_id=self.run_id,
                    output_dir=self.output_dir,
                    weights=weights,
                    describe=described,
                ),
                self._gather,
            )
            fleet.resend = self._transfer.resend if sender else None
        members = together(lambda: fleet.reachable() if sender else [], self._gather)

        def send() -> dict[str, Any]:
            with fleet.exclusive:
                report, failed = self._transfer.send(
                    weights, label, version, [m.server for m in members], sender=sender
                )
                if not sender:
                    return {}
                errors = {server.url: error for server, error in failed}
                for member in members:
                    if member.url in errors:
                        fleet.lost(member, errors[member.url])
                sent = Weights(label, version, self._transfer.adapter)
                fleet.synced(sent, [m.url for m in members if m.url not in errors])
                self._weights = sent  # requests ask for them from here on
            fleet.wait_for_one()
            up = [m.url for m in fleet.up()]
            return {"report": asdict(report), "adapter": self._transfer.adapter, "up": up}

        result = self._shared(send)
        if not sender:
            with fleet.exclusive:
                self._weights = Weights(label, version, result["adapter"])
                fleet.synced(self._weights, result["up"])
        return SyncReport(**result["report"])

    def probe(self, ids: Sequence[int], sampling: Sampling) -> list[Completion]:
        """One completion of `ids` from each server that is up; one that fails leaves the rotation and gives none."""
        prompt = Prompt("probe", tuple(ids), "")
        self._check([prompt], 1, sampling)
        for _ in range(_FAULTS + 1):
            self._fleet.wait_for_one()
            found = []
            for member in self._fleet.up():
                try:
                    answers = self._ask(member.server, self._request_id(), prompt, 1, sampling)
                except ServerRefused:
                    raise
                except ServerError as error:
                    self._fleet.lost(member, error)
                else:
                    found.append(self._rollouts(prompt, answers, 1)[0].completion)
            if found:
                return found
        raise RolloutError(
            f"No server answered a probe in {_FAULTS + 1} rounds: {'; '.join(m.fault for m in self._fleet.members)}"
        )

    def verify(self) -> None:
        """Compares the weights in every server's memory with those of the last sync, on the first process. A server that is gone, or was
        restarted, leaves the rotation; raises SyncError for one that holds something else."""
        if self._transfer is None or self.rank > 0:
            return
        with self._fleet.exclusive:
            for member in self._fleet.up():
                try:
                    if member.server.weight_label() == "default":
                        raise ServerGone(member.url, "it was restarted since the last sync")
                    self._transfer.verify(member.server)
                except ServerRefused:
                    raise
                except ServerError as error:
                    self._fleet.lost(member, error)

    def pop_metrics(self) -> dict[str, float]:
        """What happened since the last call: groups sent again, faults of servers; and how many servers are up."""
        resent, self._resent = self._resent, 0
        faults = self._fleet.counts.pop("server_faults", 0)
        return {
            "rollout/resent": float(resent),
            "rollout/server_faults": float(faults),
            "rollout/servers_up": float(len(self._fleet.up())),
        }

    def rest(self) -> None:
        """Nothing to free: servers have devices of their own."""

    def close(self) -> None:
        """Closes connections and what the transfer holds; may be called twice."""
        transfer, self._transfer = self._transfer, None
        for member in self._fleet.members:
            member.server.hang_up()  # what resends weights in another thread ends, and with it the lock
        try:
            if transfer is not None:
                with self._fleet.exclusive:
                    transfer.close()
        finally:
            self._fleet.close()

    def _request_id(self) -> str:
        return f"{self.run_id}-{self.rank}-{next(self._numbers)}"

    def _shared(self, action: Callable[[], Any]) -> Any:
        """The first process's `action()`, a JSON value, on all of them; all raise when it fails."""
        mine = together(action, self._gather)
        return self._gather(mine)[0]


class _Call:
    """The requests of one `generate`, each in a thread that is blocked in its socket."""

    def __init__(self, engine: VLLMServerEngine, n: int, sampling: Sampling) -> None:
        self.engine, self.n, self.sampling = engine, n, sampling
        self.results: SimpleQueue[tuple[_Task, list[Answer] | BaseException]] = SimpleQueue()
        self._in_flight: dict[str, Member] = {}
        self._aborted = False

    def send(self, task: _Task, member: Member) -> None:
        request_id = self.engine._request_id()
        self._in_flight[request_id] = member
        arguments = (task, member, request_id)
        threading.Thread(target=self._run, args=arguments, name="llmrl-request", daemon=True).start()

    def _run(self, task: _Task, member: Member, request_id: str) -> None:
        fleet = self.engine._fleet
        result: list[Answer] | BaseException
        try:
            result = self.engine._ask(member.server, request_id, task.prompt, self.n, self.sampling)
        except BaseException as error:
            result = error
        if isinstance(result, ServerGone | ServerFault) and not self._aborted:
            task.last = member
            fleet.lost(member, result)
        fleet.give_back(member, task.tokens, good=isinstance(result, list))
        self._in_flight.pop(request_id, None)
        self.results.put((task, result))

    def abort(self) -> None:
        """Asks the servers to end what is in flight; waits for two seconds at most."""
        self._aborted = True
        by_member: dict[str, list[str]] = {}
        servers = {}
        for request_id, member in list(self._in_flight.items()):
            by_member.setdefault(member.url, []).append(request_id)
            servers[member.url] = member.server
        threads = [
            threading.Thread(target=_abort, args=(servers[url], ids), daemon=True) for url, ids in by_member.items()
        ]
        deadline = time.monotonic() + 2
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _abort(server: VLLMServer, request_ids: list[str]) -> None:
    try:
        server.abort(request_ids)
    except ServerError as error:
        logger.debug("%s", error)
