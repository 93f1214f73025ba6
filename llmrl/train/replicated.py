"""Every process holds the whole model: one process, or DDP. Also what every strategy has in common.

A strategy says how parameters, gradients and optimizer state lie on the processes; `Backend` does everything else, once. All methods
are collective: every process calls them, in the same order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmrl.errors import ConfigError
from llmrl.train.collectives import Collectives
from llmrl.train.optim_state import OptimizerReader, Piece

BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Replicated:
    """Whole parameters, gradients and optimizer state on every process; DDP where there are several."""

    name = "ddp"
    shards_parameters = False
    """Whether a parameter outside of the forward is only this process's part of it."""
    shards_optimizer = False
    layer_dtype: torch.dtype | None = None
    """The type in which decoder layers are gathered to be computed with; None: their own."""

    def __init__(self, processes: Collectives) -> None:
        self.processes = processes

    def prepare(self, module: nn.Module, build: BuildOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Moves `module` to the device, wraps it, and makes its optimizer; returns both."""
        self.unwrapped = module.to(self.processes.device)
        self.optimizer = build(self.unwrapped)
        self.module: nn.Module = self.unwrapped
        if self.processes.world_size > 1:
            with warnings.catch_warnings():
                # torch 2.13 has another name for broadcast_buffers, which 2.11 does not know.
                warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
                self.module = DistributedDataParallel(
                    self.unwrapped,
                    device_ids=[self.processes.device] if self.processes.device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
        return self.module, self.optimizer

    def prepare_frozen(self, module: nn.Module, offload: bool = False) -> nn.Module:
        """A model that is only scored with, such as the reference, laid out as the policy is; `offload`: in host memory."""
        return module.to("cpu" if offload else self.processes.device)

    def reducing(self, last: bool) -> AbstractContextManager[Any]:
        """The context of a microbatch's forward and backward; `last` of the update."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self) -> dict[str, list[Tensor]]:
        """This process's gradients, to be changed in place, by part of the optimizer's groups.

        Raises ConfigError where DDP could not reduce them: it reduces a bucket when all of it has a gradient, so with an unused
        parameter others would silently stay unreduced.
        """
        if self.processes.world_size > 1:
            unused = [n for n, p in self.unwrapped.named_parameters() if p.requires_grad and p.grad is None]
            if unused:
                raise ConfigError(
                    f"{len(unused)} trainable parameter(s) got no gradient, which data-parallel training can't reduce: "
                    f"{', '.join(unused[:5])}. Freeze them (requires_grad False), or train in one process"
                )
        return by_part(self.optimizer)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The L2 norm of a part's gradients over all processes: a scalar on the device."""
        return nn.utils.get_total_norm(gradients)

    def step(self, left_out: Sequence[str]) -> None:
        """The optimizer's step. Of the parts in `left_out` parameters and moments stay: had Adam taken in zeros, its first steps
        afterwards would be too large."""
        leave_out(self.optimizer, left_out)
        self.optimizer.step()

    def discard(self) -> None:
        """Instead of a step: the gradients are forgotten."""

    def settle(self) -> None:
        """After forwards without a backward: parameters lie as between two updates."""

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter of a prepared module in full, without a gradient, on every process."""
        return tensor.detach()

    def fill(self, parameter: Tensor, value: Tensor) -> None:
        """Sets a parameter of a prepared module from its whole value, which every process gives."""
        with torch.no_grad():
            parameter.copy_(value)

    def filled(self) -> None:
        """Called when all parameters were filled."""

    def optimizer_pieces(self) -> Iterator[Piece]:
        """What this process writes of the optimizer's state."""
        if self.processes.rank == 0:
            for name, parameter in trained(self.unwrapped, self.optimizer):
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    yield Piece(name, key, torch.as_tensor(value))

    def load_optimizer(self, reader: OptimizerReader) -> None:
        """Puts back what a run of any strategy and any number of processes wrote. Raises ConfigError where it is another model's."""
        reader.check({name: tuple(p.shape) for name, p in trained(self.unwrapped, self.optimizer)})
        state = {
            index: {key: reader.whole(name, key) for key in reader.keys(name)}
            for index, (name, _) in enumerate(trained(self.unwrapped, self.optimizer))
            if reader.keys(name)
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def check(self) -> None:
        """Raises ConfigError unless the parameters lie as they were asked to."""


def by_part(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """The gradients that there are, by the part of their group: a critic's must not take the policy's share of the clip."""
    parts: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        parts.setdefault(group["part"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    return {part: gradients for part, gradients in parts.items() if gradients}


def leave_out(optimizer: torch.optim.Optimizer, parts: Sequence[str]) -> None:
    """Takes the gradients of these parts away, so that the optimizer passes over them."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["part"] in parts else ():
            parameter.grad = None


def summed_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The L2 norm of gradients of which every process holds a part."""
    local = [g for g in gradients if g.numel()]
    norm = nn.utils.get_total_norm(local) if local else torch.zeros(())
    square = norm.to(device, torch.float64).square()
    dist.all_reduce(square)
    return square.sqrt()


def materialise(module: nn.Module) -> dict[str, Tensor]:
    """Gives what is on the "meta" device room on the host, which takes memory only where it is written to; tied ones stay tied.

    Returns the parameters by name, as they are before they are sharded.
    """
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                empty = torch.empty_like(parameter, device="cpu")
                owner._parameters[name] = made.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                owner._buffers[name] = torch.empty_like(buffer, device="cpu")
    return {name: p.detach() for name, p in module.named_parameters()}


def broadcast_buffers(module: nn.Module, device: torch.device) -> None:
    """The first process's buffers on all."""
    for buffer in module.buffers():
        value = buffer.detach().to(device)
        dist.broadcast(value, src=0)
        buffer.copy_(value)


def trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) in the order of the optimizer's state."""
    names = {id(p): name for name, p in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter
