"""Weights from GPU to GPU, through the NCCL weight transfer that vLLM brings: packed buckets, broadcast by the training process.

Needs vLLM and a GPU in the training process. The handshake, the stream and the failures around it are tested with a stand-in for
vLLM's trainer half at its documented surface; the broadcast itself has not been run by this project's tests, which have no GPU.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from llmrl.errors import ConfigError, SyncError
from llmrl.rollout.fingerprint import Fingerprint, fingerprint
from llmrl.rollout.vllm_client import ServerError, ServerFault, ServerGone, VLLMServer
from llmrl.rollout.weight_proof import Proof
from llmrl.types import PolicyWeights, SyncReport

try:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
except ImportError as error:
    raise ConfigError(
        f"rollout.transfer nccl uses vLLM's own trainer half, which can't be imported here ({error}). Install vLLM 0.32 beside the "
        "trainer (pip install 'llmrl[vllm]'), or use `transfer: disk`"
    ) from error

logger = logging.getLogger("llmrl")

_GRACE = 10.0
"""Seconds that a broadcast may still take once the server's side of it has failed; also those for an abort to take effect."""


class PolicySource(WeightSource):
    """vLLM's view of `PolicyWeights`: tensors on `device`, cast once to the server's `dtype`.

    `sent` is the fingerprint of what the last pass gave out.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self._dtype, self._device = dtype, device
        self.weights: PolicyWeights | None = None
        self.sent = Fingerprint()
        self._metadata: list[ParamMeta] = []
        self._stream: Iterator[tuple[str, torch.Tensor]] | None = None

    def metadata(self) -> list[ParamMeta]:
        """Names, types and shapes, from a first pass that keeps no tensor; all processes have to join that pass."""
        if not self._metadata:
            self._metadata = [ParamMeta(n, self._type(t), tuple(t.shape)) for n, t in self._pass()]
        return self._metadata

    def begin(self) -> None:
        """Says that a pass is due, which `drain` makes where nothing else does."""
        self.sent, self._stream = Fingerprint(), None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.sent = Fingerprint()
        self._stream = self._pass()
        for name, tensor in self._stream:
            cast = tensor.detach().to(self._device, self._type(tensor)).contiguous()
            self.sent += fingerprint([cast])
            yield name, cast

    def drain(self) -> None:
        """Takes what the pass that is due, or that broke off, has left, since the other processes gather every tensor with this one."""
        for _ in self._pass() if self._stream is None else self._stream:
            pass

    def _pass(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.weights is not None, "weights are set before each pass"
        return iter(self.weights)

    def _type(self, tensor: torch.Tensor) -> torch.dtype:
        return self._dtype if tensor.is_floating_point() else tensor.dtype


class SyncClient:
    """A server as vLLM's `VLLMWeightSyncClient`: the four calls of a weight update. `error` is the first failure of one."""

    def __init__(self, server: VLLMServer) -> None:
        self.server, self.label = server, ""
        self.error: ServerError | None = None

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._noting(lambda: self.server.init_transfer(init_info))

    def start_weight_update(self) -> None:
        self._noting(self.server.start_update)

    def update_weights(self, update_info: Any) -> None:
        self._noting(lambda: self.server.update(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        # vLLM's trainer half gives no version here; the label is ours.
        self._noting(lambda: self.server.finish_update(weight_version or self.label))

    def _noting(self, call: Callable[[], None]) -> None:
        try:
            call()
        except ServerError as error:
            self.error = self.error or error
            raise


class NcclTransfer:
    """The whole model by NCCL broadcast, one server after another.

    Each server has a communicator of its own, so that one that dies does not hang the others. The price is a pass over the weights a
    server: with n servers a sharded model is gathered n times a sync, and a sync takes n times as long. `passes` is that n, the same on
    every process, those that don't send included; a pass is made for servers that are down, too. `address` is that of this machine as
    the servers reach it (default: its host name); a free port is taken for each server.
    """

    adapter: str | None = None

    def __init__(
        self,
        dtype: torch.dtype,
        address: str | None = None,
        *,
        passes: int = 1,
        engine_class: Any = NCCLTrainerWeightTransferEngine,
        device: torch.device | str | None = None,
    ) -> None:
        if device is None and not torch.cuda.is_available():
            raise ConfigError(
                "rollout.transfer nccl moves weights from GPU to GPU, and this process has no CUDA device. Use `transfer: disk`"
            )
        self._device = torch.device(device or f"cuda:{torch.cuda.current_device()}")
        self._address = address or socket.gethostname()
        self._engine_class, self._passes = engine_class, passes
        self._source = PolicySource(dtype, self._device)
        self._channels: dict[str, tuple[Any, SyncClient]] = {}
        self.proof = Proof()

    def send(
        self, weights: PolicyWeights, version_label: str, version: int, servers: Sequence[VLLMServer], *, sender: bool
    ) -> tuple[SyncReport, list[tuple[VLLMServer, ServerError]]]:
        """See `Transfer.send`. A server whose update fails is not tried again before the next sync."""
        started = time.perf_counter()
        self._source.weights = weights
        self._source.metadata()
        if not sender:
            for _ in range(self._passes):
                for _ in weights:
                    pass
            return SyncReport(version), []
        failures: list[tuple[VLLMServer, ServerError]] = []
        content, wrong = Fingerprint(), None
        for server in servers:
            self._source.begin()
            try:
                if wrong is None:
                    self._update(server, version_label)
                    content = self._source.sent
            except ServerError as error:
                self._drop(server)
                failures.append((server, error))
            except SyncError as error:  # raised once the other processes have made all their passes
                wrong = error
            finally:
                self._source.drain()
        for _ in range(self._passes - len(servers)):
            self._source.begin()
            self._source.drain()
        if wrong is not None:
            raise wrong
        seconds = time.perf_counter() - started
        return SyncReport(version, content.count, content.bytes, content.hex, seconds), failures

    def resend(self, server: VLLMServer) -> None:
        """Raises SyncError: nothing of a version is kept, and all processes have to take part in sending it."""
        raise SyncError(
            f"{server.url}: a server that restarts gets weights at the next sync, as nccl keeps no copy of them. With `transfer: disk` "
            "it would get them at once"
        )

    def verify(self, server: VLLMServer) -> None:
        """See `Transfer.verify`."""
        self.proof.verify(server)

    def close(self) -> None:
        """See `Transfer.close`."""
        for engine, client in self._channels.values():
            engine.shutdown()
            with suppress(ServerError):
                client.server.shutdown_transfer()
        self._channels = {}

    def _update(self, server: VLLMServer, label: str) -> None:
        server.pause()
        try:
            if server.url in self._channels and server.weight_label() != self.proof.label(server):
                self._drop(server)  # it restarted: nobody is at the other end
            engine, client = self._channels.get(server.url) or self._connect(server)
        except ServerError:
            with suppress(ServerError):
                server.resume()  # its weights are whole
            raise
        before = None
        with suppress(ServerFault):
            before = server.weights()
        client.label, client.error = label, None
        self._bounded(engine, client, engine.send_weights)
        server.reset_prefix_cache()
        self.proof.check(server, label, self._source.sent, before)
        server.resume()

    def _connect(self, server: VLLMServer) -> tuple[Any, SyncClient]:
        """Opens a communicator of this process and the server's workers."""
        client = SyncClient(server)
        with suppress(ServerError):
            server.shutdown_transfer()  # what an earlier run, or an earlier failure, left open
        info = NCCLTrainerInitInfo(
            master_address=self._address, master_port=_free_port(), world_size=1 + server.world_size(), rank=0
        )
        made: list[Any] = []
        self._bounded(
            None,
            client,
            lambda: made.append(self._engine_class.trainer_init(info, client=client, source=self._source)),
        )
        self._channels[server.url] = made[0], client
        return self._channels[server.url]

    def _bounded(self, engine: Any, client: SyncClient, work: Callable[[], Any]) -> None:
        """Runs `work`, but no longer than the server's side of it: a broadcast to a peer that has died would never return.

        The server's side is an HTTP call, which fails when the server dies and has a time limit. The communicator is then aborted.
        """
        outcome: list[BaseException | None] = []

        def run() -> None:
            try:
                if self._device.type == "cuda":
                    torch.cuda.set_device(self._device)
                work()
                outcome.append(None)
            except BaseException as error:  # handed to the caller's thread
                outcome.append(error)

        thread = threading.Thread(target=run, daemon=True, name="llmrl-nccl")
        thread.start()
        while thread.is_alive() and client.error is None:
            thread.join(0.1)
        thread.join(_GRACE)
        if thread.is_alive() and engine is not None:
            engine.shutdown()  # aborts the communicator
            thread.join(_GRACE)
        if thread.is_alive():
            raise SyncError(
                f"{client.server.url}: its side of the NCCL transfer failed ({client.error}) and this side does not come back. Start "
                "again from the checkpoint, once the server is up; rollout.nccl_address has to be an address that it reaches"
            )
        error = client.error or outcome[0]
        if isinstance(error, ServerError | SyncError):
            raise error
        if error is not None:
            raise ServerGone(
                client.server.url,
                f"the NCCL transfer failed ({type(error).__name__}: {error}). The server has to reach {self._address} on any port, over "
                "the interface that NCCL_SOCKET_IFNAME names; rollout.nccl_address sets the address",
            ) from error

    def _drop(self, server: VLLMServer) -> None:
        engine, _ = self._channels.pop(server.url, (None, None))
        if engine is not None:
            with suppress(Exception):  # it is broken already
                engine.shutdown()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])
