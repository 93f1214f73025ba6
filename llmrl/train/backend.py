"""The processes, the device, the precision and the optimizer step: the only code that knows how many processes there are.

Losses that come in are weighted sums whose weights already count the whole update over all processes (design: one denominator,
one place). DDP, FSDP2 and DeepSpeed divide summed gradients by the number of processes; that division is undone here and nowhere else.
How parameters lie on the processes is a strategy's business: replicated.py, fsdp.py, zero.py.
"""

from __future__ import annotations

import atexit
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from llmrl.errors import ConfigError, DivergenceError, together
from llmrl.models.weights import ModelWeights
from llmrl.train.collectives import Collectives, reduce_stats, transport_timeout
from llmrl.train.launch import check_sharded, check_world_size, read_launch, without_accelerates_sharding
from llmrl.train.offload import offload_activations
from llmrl.train.optim import build_optimizer, learning_rate_at
from llmrl.train.optim_state import OptimizerReader, held, write_pieces
from llmrl.train.replicated import Replicated, leave_out
from llmrl.train.standing import Standing
from llmrl.train.state import rng_state, seed_everything, set_rng_state
from llmrl.train.trackers import check_trackers
from llmrl.types import PolicyWeights

M = TypeVar("M")
R = TypeVar("R")
LossFn = Callable[[Any, M], tuple[torch.Tensor, Mapping[str, Any]]]


@dataclass(frozen=True)
class UpdateStats:
    """What one optimizer step did, the same on every process.

    `grad_norm` is the global L2 norm before clipping (each part of `Backend.prepare` is clipped by itself); `skipped` says that no step was taken, because a loss or the gradient was
    not finite or because no process had a microbatch. `sums` are the statistics of the loss function over microbatches and processes.
    """

    grad_norm: float
    learning_rate: float
    skipped: bool
    sums: dict[str, float] = field(default_factory=dict)


class Backend(Collectives):
    """One process, or several (DDP, FSDP2, DeepSpeed ZeRO-2 and ZeRO-3, over NCCL or gloo) that torchrun or `accelerate launch` started.

    `config` has the keys of TrainFields and ModelFields; the sharding is the launcher's. Making a Backend seeds every generator with
    `config.seed`, so that all processes initialise alike; `prepare` then seeds each by its rank, so that their dropout differs.

    Raises ConfigError when the launcher asks for what llmrl can't do or for another precision, or when fewer or more processes came
    up than asked for.
    """

    def __init__(self, config: Any) -> None:
        self.launch = read_launch(os.environ, config.mixed_precision)
        check_trackers(config.report_to)
        timeout = transport_timeout(config.collective_timeout, "cuda" if torch.cuda.is_available() else "cpu")
        # Precision, wrapping and accumulation are done here, in the open; accelerate brings the process group and the trackers.
        with without_accelerates_sharding():
            self.accelerator = Accelerator(
                mixed_precision="no",
                cpu=not torch.cuda.is_available(),
                log_with=list(config.report_to) or None,
                project_dir=str(Path(config.output_dir, "trackers")),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
            )
        state = self.accelerator.state
        device = torch.device("cpu") if state.device.type == "cpu" else state.device  # not "cpu:0"
        standing = Standing(state.process_index, state.num_processes, config.collective_timeout)
        super().__init__(state.process_index, state.num_processes, device, standing=standing)
        check_world_size(os.environ, self.world_size, config.num_processes)
        if dist.is_initialized():
            atexit.register(_close_process_group)
        if self.world_size > 1:
            standing.watch(dist.distributed_c10d._get_default_store())
        self.config = config
        self.is_main = self.rank == 0
        self.amp_dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type) if self.amp_dtype == torch.float16 else None
        self.strategy = self._make_strategy()
        self.updates = 0
        self.skipped_updates = 0
        self._skipped_in_a_row = 0
        seed_everything(config.seed)

    @property
    def load_device(self) -> torch.device:
        """Where a model is loaded to: on the host where its parameters are sharded, so that no device ever holds all of it."""
        return torch.device("cpu") if self.strategy.shards_parameters else self.device

    def load(self, whole: Callable[[], R], skeleton: Callable[[], R]) -> R:
        """`whole()`, which reads weights; where only the first process is to, `skeleton()` on the others: nothing, or a model on "meta".

        `prepare` and `fill` hand them their parts. Every process raises what one of them does.
        """
        return self.together(skeleton if self._one_reads and self.rank > 0 else whole)

    @property
    def _one_reads(self) -> bool:
        return self.launch.ram_efficient and self.strategy.shards_parameters and self.world_size > 1

    def prepare(self, module: nn.Module, *, total_updates: int, parts: Sequence[str] = ()) -> nn.Module:
        """Moves `module` to the device, wraps it and builds its optimizer; returns the wrapped module.

        `total_updates` is the length of the learning-rate schedule. `parts` are prefixes of parameter names whose gradients are
        clipped by themselves and whose rate can be scaled. Raises ConfigError when nothing in it is trainable.
        """
        self.unwrapped, self.total_updates = module, total_updates
        self.module, self.optimizer = self.strategy.prepare(module, lambda m: build_optimizer(m, self.config, parts))
        self.strategy.check()
        seed_everything(self.config.seed + self.rank)
        return self.module

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that every forward runs in."""
        if self.amp_dtype is None:
            return nullcontext()
        # Copies that autocast remembers would add up to a whole model of weights that are sharded.
        remembers = not self.strategy.shards_parameters
        return torch.autocast(self.device.type, dtype=self.amp_dtype, cache_enabled=remembers)

    def update(
        self,
        microbatches: Sequence[M],
        loss_fn: LossFn,
        empty: Callable[[], M],
        *,
        lr_scales: Mapping[str, float] | None = None,
    ) -> UpdateStats:
        """One optimizer step on the summed losses of every process's microbatches.

        `loss_fn(module, microbatch)` returns the loss, a weighted sum over the whole update, and statistics by name: numbers or
        scalar tensors that add up over microbatches and processes, except names that end in "/min" or "/max". A process with
        fewer microbatches than another runs `empty()` ones, whose gradient must be 0; their statistics are left out. `lr_scales`
        are factors of the learning rate by part ("": all other parameters); a part of factor 0 is left out of the step.

        A non-finite loss or gradient leaves parameters and optimizer untouched. Raises DivergenceError when that happened more
        than `max_nonfinite_steps` times in a row (with fp16, while the loss scale can still fall, it is not counted).
        """
        rate, scales = learning_rate_at(self.config, self.updates, self.total_updates), lr_scales or {}
        for group in self.optimizer.param_groups:
            group["lr"] = rate * scales.get(group["part"], 1.0)
        count = self.global_max(len(microbatches))
        if count == 0:
            self.updates += 1
            return UpdateStats(0.0, rate, skipped=True)
        self.module.train()
        self.strategy.zero_grad()
        with self.standing.during(f"update {self.updates + 1}", waits=True):
            losses, stats = self._accumulate(microbatches, count, loss_fn, empty)
            norm, finite, sums = self._measure(losses, stats)
            if finite:
                self._step([part for part, scale in scales.items() if scale == 0])
            else:
                self.strategy.discard()
        self.strategy.zero_grad()  # frees the gradients' memory for the rollouts
        if self.scaler is not None:
            self.scaler.update()
        self.updates += 1
        if finite:
            self._skipped_in_a_row = 0
        else:
            self._count_skipped(norm, sums)
        return UpdateStats(norm, rate, skipped=not finite, sums=sums)

    def skip_updates(self, count: int) -> None:
        """The schedule goes on by `count` updates that are not made."""
        self.updates += count

    def score(self, microbatches: Sequence[M], fn: Callable[[Any, M], R], empty: Callable[[], M]) -> list[R]:
        """`fn(module, microbatch)` of each of this process's microbatches, without gradient and without dropout.

        Every process makes the same number of forwards; results of `empty()` ones are dropped.
        """
        count = self.global_max(len(microbatches))
        with torch.no_grad(), _evaluating(self.unwrapped), self.standing.during("scoring", waits=True):
            results = []
            for i, batch in enumerate(_padded(microbatches, count, empty)):
                self.standing.at(f"microbatch {i + 1}/{count}")
                with self.autocast():
                    results.append(fn(self.module, batch))
        self.strategy.settle()
        return results[: len(microbatches)]

    def together(self, action: Callable[[], R]) -> R:
        """`action()` on every process; all raise when one fails (`errors.together`)."""
        return together(action, self.gather_json)

    def policy_weights(self) -> PolicyWeights:
        """The policy's weights, whole tensor by whole tensor, adapters merged in: what rollout engines are fed."""
        policy = getattr(self.unwrapped, "policy", self.unwrapped)  # beside a critic
        return ModelWeights(getattr(policy, "model", policy), self.strategy.whole)

    def whole_tensors(self, module: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
        """The parameters and buffers of a prepared module by name, in full on the host of rank 0; empty on the others.

        Tied ones come once. Where nothing is sharded they are the module's own. Collective.
        """
        seen: set[int] = set()
        out: dict[str, Tensor] = {}
        for name, value in module.state_dict(keep_vars=True).items():
            if id(value) in seen or (trained_only and not value.requires_grad):
                continue
            seen.add(id(value))
            whole = self.strategy.whole(value)
            if self.is_main:
                out[name] = whole.cpu() if self.strategy.shards_parameters else whole
        return out

    def fill(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Sets a prepared module's parameters and buffers from whole tensors, read with `load`; the others stay.

        Raises ConfigError for tensors that the module does not have.
        """
        if self._one_reads:
            tensors = _HandedOut(tensors, self)
        done: set[int] = set()
        if unknown := tensors.keys() - module.state_dict(keep_vars=True).keys():
            raise ConfigError(
                f"{len(unknown)} tensors are not the model's, {min(unknown)} first: they are of another model"
            )
        for name, value in module.state_dict(keep_vars=True).items():
            if name in tensors and id(value) not in done:
                done.add(id(value))
                if isinstance(value, nn.Parameter):
                    self.strategy.fill(value, tensors[name])
                else:
                    value.copy_(tensors[name])
        self.strategy.filled()

    def gather_state(self) -> Callable[[Path], list[Path]]:
        """What writes this process's part of optimizer, counters, loss scale and generators into a directory and names the files.

        Collective, so that nothing has to wait for others once files are written, which may fail.
        """
        writers = self.world_size if self.strategy.shards_optimizer else 1
        pieces, rng = held(self.strategy.optimizer_pieces()), self.rng_state()
        state = {
            "updates": self.updates,
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self._skipped_in_a_row,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "world_size": self.world_size,
            "strategy": self.strategy.name,
        }

        def write(directory: Path) -> list[Path]:
            files = write_pieces(directory, pieces, self.rank, writers)
            files.append(directory / f"rng_{self.rank:05d}.json")
            files[-1].write_text(json.dumps(rng))
            if self.is_main:
                files.append(directory / "backend.json")
                files[-1].write_text(json.dumps(state))
            return files

        return write

    def load_state(self, directory: Path) -> None:
        """Continues from what `gather_state` gave, on every process, whatever the strategy was. With another number of processes the generators
        are seeded anew."""
        state = json.loads((directory / "backend.json").read_text())
        self.strategy.load_optimizer(OptimizerReader(directory))
        self.updates, self.skipped_updates = state["updates"], state["skipped_updates"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if state["world_size"] == self.world_size:
            set_rng_state(json.loads((directory / f"rng_{self.rank:05d}.json").read_text()), self.device)
        else:
            seed_everything(self.config.seed + self.rank + self.world_size * self.updates)

    def rng_state(self) -> dict[str, Any]:
        """This process's random generators."""
        return rng_state(self.device)

    def _accumulate(
        self, microbatches: Sequence[M], count: int, loss_fn: LossFn, empty: Callable[[], M]
    ) -> tuple[list[torch.Tensor], list[tuple[str, torch.Tensor]]]:
        """Forward and backward of all microbatches; gradients are reduced in the last backward only. Nothing waits for the device."""
        losses, stats = [], []
        for i, batch in enumerate(_padded(microbatches, count, empty)):
            self.standing.at(f"microbatch {i + 1}/{count}")
            with self.strategy.reducing(last=i == count - 1):
                with self.autocast(), self._kept():
                    loss, values = loss_fn(self.module, batch)
                scaled = loss * self.world_size
                self.strategy.backward(scaled if self.scaler is None else self.scaler.scale(scaled))
            losses.append(loss.detach())
            if i < len(microbatches):
                stats += [(name, torch.as_tensor(value).detach()) for name, value in values.items()]
        return losses, stats

    def _kept(self) -> AbstractContextManager[Any]:
        """Around a forward: where what its backward needs waits for it."""
        return offload_activations(self.device) if self.config.activation_offloading else nullcontext()

    def _measure(
        self, losses: list[torch.Tensor], stats: list[tuple[str, torch.Tensor]]
    ) -> tuple[float, bool, dict[str, float]]:
        """(gradient norm before clipping, everything finite on every process, reduced statistics); clips. Waits for the device once."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        limit = self.config.max_grad_norm if self.config.max_grad_norm > 0 else math.inf
        norms = [self._clip(gradients, limit) for gradients in self.strategy.gradients().values()]
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        tensors = [norm, torch.stack(losses).sum(), *(value for _, value in stats)]
        norm_value, loss_value, *values = torch.stack([t.to(self.device, torch.float64) for t in tensors]).tolist()
        local: dict[str, list[float]] = {}
        for (name, _), value in zip(stats, values, strict=True):
            local.setdefault(name, []).append(value)
        parts = self.gather_json([math.isfinite(norm_value) and math.isfinite(loss_value), local])
        return norm_value, all(ok for ok, _ in parts), reduce_stats([part for _, part in parts])

    def _clip(self, gradients: Sequence[Tensor], limit: float) -> Tensor:
        """Scales a part's gradients down to the norm `limit`; returns their norm before, over all processes."""
        norm = self.strategy.norm(gradients)
        if limit < math.inf:
            # As torch's clip_grad_norm_: always multiplied, so that nothing waits for the device.
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device, gradient.dtype))
        return norm

    def _step(self, left_out: Sequence[str]) -> None:
        if self.scaler is None:
            self.strategy.step(left_out)
        else:
            leave_out(self.optimizer, left_out)
            self.scaler.step(self.optimizer)

    def _make_strategy(self) -> Replicated:
        if self.launch.strategy == "ddp":
            return Replicated(self)
        check_sharded(self.config, self.launch.strategy)
        if self.launch.strategy == "fsdp2":
            from llmrl.train.fsdp import FullySharded

            return FullySharded(self, self.launch, self.amp_dtype)
        from llmrl.train.zero import Zero

        return Zero(self, self.launch, self.amp_dtype)

    def _count_skipped(self, norm: float, sums: Mapping[str, float]) -> None:
        self.skipped_updates += 1
        if self.scaler is not None and self.scaler.get_scale() >= 1.0 and math.isfinite(sum(sums.values())):
            return  # fp16 looks for its scale by overflowing; it is halved each time, so this ends
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self.config.max_nonfinite_steps:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in sums.items()) or "none"
            raise DivergenceError(
                f"update {self.updates}: the loss or the gradient is not finite (gradient norm {norm}; statistics: {shown}), as in "
                f"{self._skipped_in_a_row} updates in a row; max_nonfinite_steps allows {self.config.max_nonfinite_steps}. The "
                "parameters are as they were before these updates. Lower learning_rate, set or lower max_grad_norm, use bf16 or "
                "no mixed precision instead of fp16, and look for extreme values in rewards or data"
            )


class _HandedOut(Mapping[str, Tensor]):
    """Tensors that the first process has, one at a time on all: each is sent when it is asked for, by all in the same order."""

    def __init__(self, tensors: Mapping[str, Tensor], processes: Collectives) -> None:
        self._tensors, self._processes = tensors, processes
        kinds = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}
        self._kinds: dict[str, Any] = processes.broadcast_json(kinds)

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._kinds[name]
        mine = self._tensors[name] if self._processes.rank == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
        value = mine.to(self._processes.device)
        dist.broadcast(value, src=0)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def _padded(microbatches: Sequence[M], count: int, empty: Callable[[], M]) -> Iterator[M]:
    yield from microbatches
    for _ in range(count - len(microbatches)):
        yield empty()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule has the mode that it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _close_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
