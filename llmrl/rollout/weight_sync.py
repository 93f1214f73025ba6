"""Moves the policy's weights to generation servers through files, and proves that they arrived."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from llmrl.config.rollout import RolloutSettings
from llmrl.errors import ConfigError, RolloutError, SyncError
from llmrl.rollout.fingerprint import Fingerprint, fingerprint
from llmrl.rollout.vllm_client import ServerError, ServerFault, ServerGone, VLLMServer, is_loopback
from llmrl.rollout.weight_files import BUCKET_BYTES, Shipment, WeightFiles
from llmrl.rollout.weight_proof import Proof
from llmrl.types import PolicyWeights, SyncReport

__all__ = ["BUCKET_BYTES", "AdapterTransfer", "DiskTransfer", "Failures", "Transfer", "make_transfer"]

logger = logging.getLogger("llmrl")

Failures = list[tuple[VLLMServer, ServerError]]
"""Servers that could not be updated, each with why. One whose weights are half loaded is left paused: generating would end it."""

_SHARED_MEMORY = Path("/dev/shm")


class Transfer(Protocol):
    """Moves weights to servers. `adapter` is the name that requests put in `model` to sample with the last version, where the servers
    hold it as an adapter; None where it is the model itself."""

    adapter: str | None

    def send(
        self,
        weights: PolicyWeights,
        version_label: str,
        version: int,
        servers: Sequence[VLLMServer],
        *,
        sender: bool,
    ) -> tuple[SyncReport, Failures]:
        """Updates the servers, proves it and resumes them; those that failed are returned, the others have the new weights.

        Every process calls it, with the same servers, and all iterate `weights`; only the sender talks. Raises SyncError when a server
        took everything and holds something else, RolloutError when the weights can't be written (no server was touched then).
        """
        ...

    def resend(self, server: VLLMServer) -> None:
        """The last version again, to a server that restarted. Raises ServerError or SyncError."""
        ...

    def verify(self, server: VLLMServer) -> None:
        """Raises SyncError when the server does not hold what the last sync left there."""
        ...

    def close(self) -> None:
        """Removes files and connections; may be called twice."""
        ...


class DiskTransfer:
    """The whole model through safetensors files, all servers at the same time.

    Files are complete before a server is paused, so that it stands still only while it loads; loading the first file while later ones
    are written would lengthen the pause and save at most the time of loading. `dtype` is that of the servers' parameters.
    """

    adapter: str | None = None

    def __init__(self, files: WeightFiles, dtype: torch.dtype) -> None:
        self._files, self._dtype = files, dtype
        self.proof = Proof()
        self._shipment: Shipment | None = None
        self._begun: set[str] = set()  # servers with an update that was begun and not proved
        self._lock = threading.Lock()  # a server that restarts is not sent a version that is just being replaced

    def send(
        self, weights: PolicyWeights, version_label: str, version: int, servers: Sequence[VLLMServer], *, sender: bool
    ) -> tuple[SyncReport, Failures]:
        """See `Transfer.send`."""
        return self.send_stream(iter(weights), version_label, version, servers, sender=sender)

    def send_stream(
        self,
        stream: Iterator[tuple[str, torch.Tensor]],
        label: str,
        version: int,
        servers: Sequence[VLLMServer],
        *,
        sender: bool,
        unless_held: bool = False,
    ) -> tuple[SyncReport, Failures]:
        """`send` of any stream of (name, tensor). unless_held: a server that has these weights already only gets the label."""
        if not sender:
            for _ in stream:
                pass
            return SyncReport(version), []
        with self._lock:
            started = time.perf_counter()
            self._shipment = None
            shipment = self._files.write(stream, label, self._dtype)
            self.proof.check_shapes(label, shipment.shapes)
            self._shipment = shipment
            lacking = [s for s in servers if not (unless_held and self._accepts(s, shipment))]
            failures = at_once(lacking, lambda server: self._update(server, shipment))
            if unless_held and not lacking:
                self._files.remove()
        seconds = time.perf_counter() - started
        logger.debug("weights %s: %.3f s, of which %.3f s writing", label, seconds, shipment.seconds)
        content = shipment.content
        return SyncReport(version, content.count, content.bytes, content.hex, seconds), failures

    def resend(self, server: VLLMServer) -> None:
        """See `Transfer.resend`; nothing is loaded where the server holds these weights already."""
        with self._lock:
            if self._shipment is None:
                raise SyncError(f"{server.url}: there are no weights to send again; the next sync brings some")
            if self._accepts(server, self._shipment):
                return
            if not all(path.exists() for path in self._shipment.files):
                raise SyncError(
                    f"{server.url}: it restarted with other base weights than it, or the other servers, had before. "
                    "Start it with the same --model as at first"
                )
            self._update(server, self._shipment)

    def verify(self, server: VLLMServer) -> None:
        """See `Transfer.verify`."""
        self.proof.verify(server)

    def close(self) -> None:
        """See `Transfer.close`."""
        self._files.close()

    def _accepts(self, server: VLLMServer, shipment: Shipment) -> bool:
        if server.url in self._begun:  # all may be loaded and the update not finished: the next request would end it
            return False
        try:
            if not self.proof.accept(server, shipment.label, shipment.content):
                return False
            server.resume()  # an update that broke off after its proof left it paused
            return True
        except ServerError:  # half-loaded weights have no fingerprint; sending shows what else it may be
            return False

    def _update(self, server: VLLMServer, shipment: Shipment) -> None:
        """Pauses the server, loads, proves and resumes. After a fault the whole update is tried once more; then it stays paused."""
        try:
            server.pause()
        except ServerFault:
            with suppress(ServerError):
                server.resume()  # its weights are whole
            raise
        self._begun.add(server.url)
        before = None
        with suppress(ServerFault):  # of weights that an earlier update left half loaded
            before = server.weights()
        try:
            self._load(server, shipment)
        except (ServerFault, ServerGone) as error:
            # The connection that failed may be closed under the first request that uses it next, so it is asked twice.
            if not (server.is_up() or server.is_up()):
                raise
            logger.warning("%s. Sending all of weights %s again", error, shipment.label)
            try:
                self._load(server, shipment)
            except ServerFault as again:
                raise ServerFault(
                    server.url,
                    f"could not load weights {shipment.label} and stays paused ({again}). It must be able to read {self._files.path} "
                    "(the same file system and user as the trainer's; set rollout.transfer_dir), and hold the model that is trained",
                    again.status,
                ) from again
        self.proof.check(server, shipment.label, shipment.content, before)
        self._begun.discard(server.url)
        server.resume()

    def _load(self, server: VLLMServer, shipment: Shipment) -> None:
        server.start_update()
        for path in shipment.files:
            server.update({"files": [str(path)]})
        server.finish_update(shipment.label)
        # Requests that are frozen hold blocks, and then nothing is dropped. Every request is salted with the label of its weights, so
        # blocks of older weights can't serve it.
        server.reset_prefix_cache()


class AdapterTransfer:
    """The base weights once, then the LoRA adapter alone: megabytes instead of the model, and no pause.

    Each version is an adapter of its own name (its label). Requests in flight go on with theirs, and the server may read it from disk
    again, so the last `keep` versions before the newest stay. What proves a version: the base weights' fingerprint, unchanged, the
    adapter's name in each answer, and the log-probs that training compares after each sync.
    """

    def __init__(self, base: DiskTransfer, files: WeightFiles, keep: int = 1) -> None:
        self._base, self._files, self._keep = base, files, keep
        self.adapter: str | None = None
        self._based = False
        self._versions: list[tuple[str, Path]] = []

    def send(
        self, weights: PolicyWeights, version_label: str, version: int, servers: Sequence[VLLMServer], *, sender: bool
    ) -> tuple[SyncReport, Failures]:
        """See `Transfer.send`. The report is of the adapter."""
        failures: Failures = []
        started = time.perf_counter()
        if not self._based:
            _, failures = self._base.send_stream(
                weights.base(), version_label, version, servers, sender=sender, unless_held=True
            )
            self._based = True
        self.adapter = version_label
        save = weights.adapter()
        if not sender:
            return SyncReport(version), []
        content = self._write(save, version_label)
        failed = {server.url for server, _ in failures}
        old = self._versions[: -self._keep - 1]
        self._versions = self._versions[len(old) :]
        failures += at_once([s for s in servers if s.url not in failed], lambda server: self._deliver(server, old))
        for _, path in old:
            shutil.rmtree(path, ignore_errors=True)
        return SyncReport(version, content.count, content.bytes, content.hex, time.perf_counter() - started), failures

    def resend(self, server: VLLMServer) -> None:
        """See `Transfer.resend`; adapters that requests may still name are loaded, too."""
        self._base.resend(server)
        for name, path in self._versions:
            with suppress(ServerFault):
                server.unload_adapter(name)
            self._load(server, name, path)

    def verify(self, server: VLLMServer) -> None:
        """See `Transfer.verify`."""
        self._base.verify(server)

    def close(self) -> None:
        """See `Transfer.close`."""
        self._base.close()

    def _write(self, save: Callable[[Path], None], label: str) -> Fingerprint:
        try:
            path = self._files.place(f"{label}.adapter")
            draft = path.with_suffix(".draft")
            save(draft)
            draft.rename(path)
        except OSError as error:
            raise RolloutError(
                f"adapter {label} can't be written to {self._files.path}: {error}. No server was touched. Set rollout.transfer_dir to a "
                "directory with room that trainer and servers see"
            ) from error
        self._versions.append((label, path))
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            return fingerprint(file.get_tensor(name) for name in file.keys())  # noqa: SIM118

    def _deliver(self, server: VLLMServer, old: Sequence[tuple[str, Path]]) -> None:
        if server.weight_label() == "default" or self._base.proof.label(server) is None:
            self.resend(server)  # it restarted, or has had no base weights yet
        else:
            self._base.verify(server)
            self._load(server, *self._versions[-1])
        for name, _ in old:
            with suppress(ServerFault):  # a server that restarted has forgotten it
                server.unload_adapter(name)

    def _load(self, server: VLLMServer, name: str, path: Path) -> None:
        try:
            server.load_adapter(name, str(path))
        except ServerFault as error:
            raise ServerFault(
                server.url,
                f"could not load the adapter {name} from {path} ({error}). It must be able to read that directory (set "
                "rollout.transfer_dir). If this model's layers can't have adapters there, start the server without LoRA: the merged "
                "weights are then sent whole",
                error.status,
            ) from error


def at_once(servers: Sequence[VLLMServer], update: Callable[[VLLMServer], None]) -> Failures:
    """Runs `update` on all servers at the same time; ServerErrors are returned, any other error is raised once all are through."""
    if not servers:
        return []
    with ThreadPoolExecutor(len(servers)) as pool:
        futures = [(server, pool.submit(update, server)) for server in servers]
    errors = [(server, future.exception()) for server, future in futures]
    for _, error in errors:
        if error is not None and not isinstance(error, ServerError):
            raise error
    return [(server, error) for server, error in errors if isinstance(error, ServerError)]


def make_transfer(
    settings: RolloutSettings,
    servers: Sequence[VLLMServer],
    *,
    run_id: str,
    output_dir: Path,
    weights: PolicyWeights,
    describe: Mapping[str, Any],
) -> Transfer:
    """The transfer that the recipe and the servers allow; the same on every process, given the same `describe`.

    describe: what a server says about itself (`VLLMServer.describe`). Raises ConfigError for servers started for another transfer.
    """
    backend = describe.get("weight_transfer")
    if backend != settings.transfer:
        raise ConfigError(
            f"rollout.transfer is {settings.transfer}, and {servers[0].url} was started for {backend or 'no weight transfer'}. "
            f"Start it with `llmrl serve --transfer {settings.transfer}`, or change rollout.transfer"
        )
    dtype = getattr(torch, describe["dtype"])
    rank, most = weights.adapter_rank, describe.get("max_lora_rank") or 0
    if settings.transfer == "nccl":
        from llmrl.rollout.vllm_nccl import NcclTransfer

        if rank is not None:
            logger.info(
                "LoRA over nccl: the merged weights are sent whole at each sync; `transfer: disk` sends the adapter alone"
            )
        return NcclTransfer(dtype, settings.nccl_address, passes=len(servers))
    files = WeightFiles(_parent(settings, servers, output_dir), run_id)
    base = DiskTransfer(files, dtype)
    if rank is not None and rank <= most:
        return AdapterTransfer(base, files, keep=settings.max_staleness + 1)
    if rank is not None:
        reason = f"have LoRA up to rank {most} and the adapter has {rank}" if most else "were started without LoRA"
        logger.info("the servers %s: the merged weights are sent whole at each sync", reason)
    elif why := getattr(weights, "merged_because", ""):
        logger.info("the adapter has %s, which servers can't take: the merged weights are sent whole at each sync", why)
    return base


def _parent(settings: RolloutSettings, servers: Sequence[VLLMServer], output_dir: Path) -> Path:
    """Where the run's directory of weights goes: shared memory when all servers are on this machine and the model fits twice over."""
    if settings.transfer_dir is not None:
        return Path(settings.transfer_dir).expanduser()
    if all(is_loopback(server.url) for server in servers) and _SHARED_MEMORY.is_dir():
        size = sum(f.bytes for f in servers[0].weights())
        if 2 * size <= shutil.disk_usage(_SHARED_MEMORY).free:
            return _SHARED_MEMORY
    return Path(output_dir) / "weights"
