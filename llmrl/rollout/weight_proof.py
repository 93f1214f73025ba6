"""Proof that a server holds the weights that were sent to it, and still does later."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.errors import SyncError
from llmrl.rollout.fingerprint import Fingerprint
from llmrl.rollout.vllm_client import VLLMServer

logger = logging.getLogger("llmrl")


@dataclass(frozen=True)
class _Record:
    """What a server was sent last, and what its memory held afterwards, one fingerprint a worker.

    `exact`: the two have had the same sum so far, as they do where nothing is sharded, quantised or transformed.
    """

    label: str
    sent: Fingerprint
    held: tuple[Fingerprint, ...]
    exact: bool


class Proof:
    """Three comparisons after each sync of a server; each alone would miss something.

    1. What each worker read (`VLLMServer.received`) has the count, bytes and sum of what was written. It finds lost updates, files and
       tensors at the first sync already, also on sharded and quantised servers.
    2. The parameters in the server's memory have the sum of what was sent, where one worker holds them all as they are. Some models
       transform parameters while loading (Mamba's A_log, routers kept in float32): when the first sum differs although everything was
       read, this is said once, and from then on the server's sum only has to change when the sent one does, and to stay when it stays.
       That still finds updates that did nothing and weights that were put back, but not a tensor that the loader ignored; such a tensor
       shows in the log-probs, which training compares after each sync.
    3. The label is the one that was sent.

    With data parallelism vLLM reports the first replica's workers only.
    """

    def __init__(self) -> None:
        self._shapes: Mapping[str, tuple[int, ...]] | None = None
        self._records: dict[str, _Record] = {}

    def check_shapes(self, label: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises SyncError when these are not the tensors, by name and shape, of the first call."""
        if self._shapes is None:
            self._shapes = dict(shapes)
        first = self._shapes
        lost = [n for n in first if n not in shapes]
        new = [n for n in shapes if n not in first]
        other = [n for n in shapes if n in first and first[n] != shapes[n]]
        for names, what in ((lost, "lack"), (new, "hold for the first time"), (other, "have another shape of")):
            if names:
                raise SyncError(
                    f"weights {label} {what} {names[0]!r} ({len(names)} such tensors; {len(first)} in the first sync, {len(shapes)} now). "
                    "Not sent. Layers, adapters or tied weights of the model were changed during training, or a gather lost tensors: "
                    "make such changes before training starts"
                )

    def check(self, server: VLLMServer, label: str, sent: Fingerprint, before: Sequence[Fingerprint] | None) -> None:
        """Compares, right after an update, what the server holds with what was sent, and remembers it for `verify`.

        before: the server's own fingerprints ahead of the update, where it could give them. Raises SyncError.
        """
        received = server.received()
        for worker, got in enumerate(received):
            if got != sent:
                raise SyncError(
                    f"{server.url}: worker {worker} read {_say(got)} of weights {label}; sent were {_say(sent)}. An update or a part of "
                    "one was lost on the way, the files were changed, or the server reads another directory of that name. "
                    "The server stays paused. Check rollout.transfer_dir, and that no other run uses this server; then start again "
                    "from the checkpoint"
                )
        self._check_label(server, label)
        described, held = server.describe(), tuple(server.weights())
        last = self._records.get(server.url)
        if last is not None and len(last.held) != len(held):
            last = None  # started again with another number of workers
        exact = _unsharded(described) and all(f.sum == sent.sum for f in held)
        if _unsharded(described) and not exact:
            self._judge_difference(server, label, sent, held, last, before, bool(received))
        if last is not None and not exact and described.get("quantization") is None:
            self._check_change(server, label, sent, held, last)
        self._records[server.url] = _Record(label, sent, held, exact)

    def accept(self, server: VLLMServer, label: str, sent: Fingerprint) -> bool:
        """Whether the server holds just these weights already; if so it gets the label, and nothing has to be sent."""
        if not _unsharded(server.describe()):
            return False
        held = tuple(server.weights())
        if any(f.sum != sent.sum for f in held):
            return False
        server.set_weight_label(label)
        self._records[server.url] = _Record(label, sent, held, True)
        return True

    def label(self, server: VLLMServer) -> str | None:
        """Of the weights that the server was proved to hold last."""
        record = self._records.get(server.url)
        return None if record is None else record.label

    def verify(self, server: VLLMServer) -> None:
        """Raises SyncError when the server's label or the weights in its memory are not those of its last sync."""
        record = self._records.get(server.url)
        if record is None:
            raise SyncError(f"{server.url}: no weights were sent to it yet, so what it samples can't be trained on")
        self._check_label(server, record.label)
        held = tuple(server.weights())
        if held != record.held:
            raise SyncError(
                f"{server.url}: holds weights {_sums(held)} under the label {record.label}; after the sync they were "
                f"{_sums(record.held)}. Something changed them since: stale weights were restored, another run or tool updates this "
                "server, or its memory is faulty. Give each run its own servers; then start again from the checkpoint"
            )

    def _check_label(self, server: VLLMServer, label: str) -> None:
        found = server.weight_label()
        if found != label:
            started = "It was started again since. " if found == "default" else ""
            raise SyncError(
                f"{server.url}: its weights are labelled {found!r}, expected {label!r}. {started}Likely causes: the server restarted, or "
                "another run sends its weights to it. Give each run its own servers"
            )

    def _judge_difference(
        self,
        server: VLLMServer,
        label: str,
        sent: Fingerprint,
        held: tuple[Fingerprint, ...],
        last: _Record | None,
        before: Sequence[Fingerprint] | None,
        read: bool,
    ) -> None:
        """The sums differ although the server holds the model whole: a fault, unless it is the first sync and all was read."""
        found = (
            f"{server.url}: after the sync of weights {label} its memory has the sum {_sums(held)}, sent was {sent.hex}"
        )
        if last is not None and last.exact:
            raise SyncError(
                f"{found}; earlier syncs agreed. A part of the update was lost or not applied. The server stays paused. Check its log "
                "for the update; then start again from the checkpoint"
            )
        if last is None and not read and (before is None or tuple(before) == held):
            raise SyncError(
                f"{found}, and the update changed nothing in it. The update was dropped, or this model's parameters are transformed "
                "while loading, which this transfer can't tell apart: use `transfer: disk`. The server stays paused"
            )
        if last is None:
            logger.warning(
                "%s, although it took everything: this model's parameters seem to be transformed while loading. From now on its "
                "sum only has to change when the weights do; log-probs are compared as always",
                found,
            )

    def _check_change(
        self, server: VLLMServer, label: str, sent: Fingerprint, held: tuple[Fingerprint, ...], last: _Record
    ) -> None:
        changed, expected = held != last.held, sent.sum != last.sent.sum
        if changed != expected:
            what = (
                "the weights changed and its memory did not"
                if expected
                else "its memory changed and the weights did not"
            )
            raise SyncError(
                f"{server.url}: between the syncs of {last.label} and {label} {what} (sum {_sums(held)}). An update was dropped, or "
                "something else writes this server's weights. The server stays paused. Give each run its own servers; then start "
                "again from the checkpoint"
            )


def _unsharded(described: Mapping[str, Any]) -> bool:
    """Whether one worker holds all parameters as they are."""
    parallel = [described.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    return parallel == [1, 1] and described.get("quantization") is None


def _say(found: Fingerprint) -> str:
    return f"{found.count} tensors of {found.bytes} bytes with the sum {found.hex}"


def _sums(held: Sequence[Fingerprint]) -> str:
    return ", ".join(f.hex for f in held)
