"""FSDP2: every parameter, gradient and moment is split by rows over the processes (torch's `fully_shard`, applied here).

accelerate drops a request for FSDP on the CPU without a word; applied here, the same code runs over gloo and NCCL, and is tested. A
decoder layer is gathered in the autocast type when it is used; embedding, head and what else is not in a layer form one unit, which
is gathered in full precision once a forward and once a backward. Gradients are reduced in float32 at every microbatch: to keep
whole ones until the last would take as much memory as not sharding at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llmrl.errors import ConfigError
from llmrl.models.blocks import decoder_layers
from llmrl.train.collectives import Collectives
from llmrl.train.launch import Launch
from llmrl.train.optim_state import OptimizerReader, Piece
from llmrl.train.replicated import (
    BuildOptimizer,
    Replicated,
    broadcast_buffers,
    by_part,
    materialise,
    summed_norm,
    trained,
)


class FullySharded(Replicated):
    """`launch` has what the launch file says of FSDP; `compute` is the autocast type, None without."""

    name = "fsdp2"
    shards_parameters = True
    shards_optimizer = True

    def __init__(self, processes: Collectives, launch: Launch, compute: torch.dtype | None) -> None:
        super().__init__(processes)
        self._launch, self._compute = launch, compute
        self.layer_dtype = compute
        self._mesh = init_device_mesh(processes.device.type, (processes.world_size,))

    def prepare(self, module: nn.Module, build: BuildOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        reshard = self._launch.reshard_after_forward
        self.unwrapped = self.module = self._shard(module, self._launch.offload_params, reshard)
        self.optimizer = build(module)
        return module, self.optimizer

    def prepare_frozen(self, module: nn.Module, offload: bool = False) -> nn.Module:
        # After a forward without a backward nothing else would shard it again.
        return self._shard(module, offload or self._launch.offload_params, reshard=True)

    def reducing(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def gradients(self) -> dict[str, list[Tensor]]:
        return {part: [_local(g) for g in gradients] for part, gradients in by_part(self.optimizer).items()}

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return summed_norm(gradients, self.processes.device)

    def settle(self) -> None:
        for module in self.unwrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach()
        sharded: Any = tensor.detach().to(
            self.processes.device
        )  # an offloaded one is on the host, where NCCL can't gather
        return sharded.full_tensor()  # type: ignore[no-any-return]

    def fill(self, parameter: Tensor, value: Tensor) -> None:
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                # Every process has the whole value, so nothing is sent.
                local = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
                _local(parameter).copy_(_local(local))
            else:
                parameter.copy_(value)

    def optimizer_pieces(self) -> Iterator[Piece]:
        for name, parameter in trained(self.unwrapped, self.optimizer):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, DTensor):
                    if value.to_local().numel():
                        yield Piece(name, key, value.to_local(), _first_row(parameter), parameter.shape[0])
                elif self.processes.rank == 0:
                    yield Piece(name, key, torch.as_tensor(value))

    def load_optimizer(self, reader: OptimizerReader) -> None:
        parameters = dict(trained(self.unwrapped, self.optimizer))
        reader.check({name: tuple(p.shape) for name, p in parameters.items()})
        for name, parameter in parameters.items():
            state: dict[str, Any] = {}
            for key in reader.keys(name):
                if key == "step":
                    state[key] = reader.whole(name, key).to(parameter.device)
                    continue
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                first, local = _first_row(parameter), state[key].to_local()
                if local.numel():
                    local.copy_(reader.rows(name, key, first, first + local.shape[0]))
            if state:
                self.optimizer.state[parameter] = state

    def check(self) -> None:
        plain = [name for name, p in self.unwrapped.named_parameters() if not isinstance(p, DTensor)]
        if plain:
            raise ConfigError(
                f"FSDP2 was asked for, but {len(plain)} parameters are not sharded: {', '.join(plain[:3])}. Launch with "
                "recipes/accelerate/ddp.yaml, or report the model"
            )

    def _shard(self, module: nn.Module, offload: bool, reshard: bool) -> nn.Module:
        """Shards in place: one unit a decoder layer, one for the rest."""
        read = materialise(module) if self._launch.ram_efficient else {}
        parameters = list(module.parameters())
        low = {torch.bfloat16, torch.float16}
        reduce = torch.float32 if self._compute is not None or any(p.dtype in low for p in parameters) else None
        # Inputs stay as they are: autocast casts what a matrix product needs, and a weight of a token is not rounded.
        layer = MixedPrecisionPolicy(self._compute, reduce, cast_forward_inputs=False)
        rest = MixedPrecisionPolicy(None, reduce, cast_forward_inputs=False)
        policy = CPUOffloadPolicy(pin_memory=self.processes.device.type == "cuda") if offload else OffloadPolicy()
        shared: dict[str, Any] = {"mesh": self._mesh, "offload_policy": policy}
        for block in decoder_layers(module, self._launch.layer_classes):
            fully_shard(block, mp_policy=layer, reshard_after_forward=reshard, **shared)
        fully_shard(module, mp_policy=rest, reshard_after_forward=reshard, **shared)
        if self._launch.ram_efficient:
            self._hand_out(module, read)
        return module

    def _hand_out(self, module: nn.Module, read: dict[str, Tensor]) -> None:
        """Gives every process its rows of what the first one has read, one parameter at a time."""
        for name, parameter in module.named_parameters():
            assert isinstance(parameter, DTensor)
            mine = read[name] if self.processes.rank == 0 else torch.empty(parameter.shape, dtype=parameter.dtype)
            value = mine.to(self.processes.device)
            local = distribute_tensor(value, self._mesh, parameter.placements)
            with torch.no_grad():
                _local(parameter).copy_(_local(local))
        broadcast_buffers(module, self.processes.device)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _first_row(parameter: Tensor) -> int:
    """Of this process's part of a sharded parameter."""
    assert isinstance(parameter, DTensor)
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return int(offset[0]) if offset else 0
