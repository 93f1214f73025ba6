"""DeepSpeed ZeRO-2 and ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054): gradients and moments, and in stage 3 parameters, in parts.

DeepSpeed's engine does the partitioning and the communication. What it would do on its own is turned off: it gets one microbatch of
accumulation, no clipping and no scaling, so that losses, norms and skipped steps are the backend's as everywhere else. Some of what
that takes has no public name; it is used here and nowhere else, and the versions that were read are bounded in pyproject.toml.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.errors import ConfigError
from llmrl.train.collectives import Collectives
from llmrl.train.launch import Launch
from llmrl.train.optim_state import OptimizerReader, Piece
from llmrl.train.replicated import (
    BuildOptimizer,
    Replicated,
    broadcast_buffers,
    leave_out,
    materialise,
    summed_norm,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Replicated):
    """`launch.strategy` is "zero2" or "zero3"; `compute` is the autocast type, None without."""

    shards_optimizer = True

    def __init__(self, processes: Collectives, launch: Launch, compute: torch.dtype | None) -> None:
        super().__init__(processes)
        self.name, self._launch, self._compute = launch.strategy, launch, compute
        self.shards_parameters = launch.shards_parameters
        self._deepspeed = _import_deepspeed(processes.device)

    def prepare(self, module: nn.Module, build: BuildOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        if not self.shards_parameters:
            module = module.to(self.processes.device)
        elif self._launch.ram_efficient:
            materialise(module)  # DeepSpeed hands out what the first process has
        self.unwrapped = module
        self.optimizer = build(module)
        # Names by the optimizer's groups: DeepSpeed puts flat tensors in the parameters' place.
        names = {id(p): name for name, p in module.named_parameters()}
        self._names = [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]
        self._left_out: Sequence[str] = ()
        self.optimizer.register_step_pre_hook(self._before_a_flat_step)
        self.optimizer.register_step_post_hook(self._after_a_flat_step)
        config = self._config(module)
        if self.shards_parameters:
            self._partition(module, config)
        self.module, *_ = self._deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        self._zero: Any = self.module.optimizer
        if self._launch.ram_efficient and self.shards_parameters:
            broadcast_buffers(module, self.processes.device)
        return self.module, self.optimizer

    def prepare_frozen(self, module: nn.Module, offload: bool = False) -> nn.Module:
        """Whole where the policy is whole; with ZeRO-3 split as well, by FSDP2, which needs no optimizer to go with it."""
        if not self.shards_parameters:
            return super().prepare_frozen(module, offload)
        from llmrl.train.fsdp import FullySharded

        self._frozen = FullySharded(
            self.processes, Launch("fsdp2", ram_efficient=self._launch.ram_efficient), self._compute
        )
        return self._frozen.prepare_frozen(module, offload)

    def reducing(self, last: bool) -> AbstractContextManager[Any]:
        self.module.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)  # type: ignore[operator]

    def gradients(self) -> dict[str, list[Tensor]]:
        parts: dict[str, list[Tensor]] = {}
        for part, flat, averaged in self._flat_groups():
            gradients = [flat.grad] if averaged is None else averaged
            parts.setdefault(part, []).extend(g for g in gradients if g is not None)
        return parts

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return summed_norm(gradients, self.processes.device)

    def step(self, left_out: Sequence[str]) -> None:
        self._left_out = left_out
        self.module.step()  # type: ignore[operator]

    def discard(self) -> None:
        """A step that leaves every part out: DeepSpeed then frees its buffers as it does after any step."""
        for gradients in self.gradients().values():
            for gradient in gradients:
                gradient.zero_()
        self.step([group["part"] for group in self.optimizer.param_groups])

    def zero_grad(self) -> None:
        """The engine does that in its step."""

    def whole(self, tensor: Tensor) -> Tensor:
        if hasattr(tensor, "ds_id"):
            with self._deepspeed.zero.GatheredParameters([tensor]):
                return tensor.detach().clone()
        if hasattr(tensor, "placements"):  # of a frozen model
            return self._frozen.whole(tensor)
        return tensor.detach()

    def fill(self, parameter: Tensor, value: Tensor) -> None:
        value = value.to(self.processes.device, parameter.dtype)
        if hasattr(parameter, "ds_id"):
            with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                parameter.copy_(value)
            if parameter.requires_grad:
                self._deepspeed.utils.safe_set_full_fp32_param(parameter, value.float())
        elif self.shards_parameters and hasattr(parameter, "placements"):
            self._frozen.fill(parameter, value)
        else:
            with torch.no_grad():
                parameter.copy_(value)

    def filled(self) -> None:
        if not self.shards_parameters:
            self._zero.refresh_fp32_params()

    def optimizer_pieces(self) -> Iterator[Piece]:
        """Whole tensors, each gathered by all and written by one, in turn: their flat partitions fit no other number of processes."""
        steps = self._steps()
        self._link_moments()
        parameters = dict(self.unwrapped.named_parameters())
        for number, (name, step) in enumerate(steps.items()):
            mine = number % self.processes.world_size == self.processes.rank
            for key in _MOMENTS:
                value = self._deepspeed.utils.safe_get_full_optimizer_state(parameters[name], key)
                if mine:
                    yield Piece(name, key, value)
            if mine:
                yield Piece(name, "step", step)

    def load_optimizer(self, reader: OptimizerReader) -> None:
        parameters = dict(self.unwrapped.named_parameters())
        names = [name for group in self._names for name in group]
        reader.check({name: self._shape(parameters[name]) for name in names})
        for names_of_group, flats in zip(self._names, self._flats()):
            kept = [name for name in names_of_group if reader.keys(name)]
            if not kept:
                continue
            for flat in flats:
                self.optimizer.state[flat] = {
                    "step": reader.whole(kept[0], "step").to(flat.device),
                    **{key: torch.zeros_like(flat) for key in _MOMENTS},
                }
        self._link_moments()
        for name in names:
            for key in _MOMENTS if reader.keys(name) else ():
                value = reader.whole(name, key).to(self.processes.device)
                self._deepspeed.utils.safe_set_full_optimizer_state(parameters[name], value, key)

    def check(self) -> None:
        stage = 3 if self.shards_parameters else 2
        got = self.module.zero_optimization_stage()  # type: ignore[operator]
        unsplit = [n for n, p in self.unwrapped.named_parameters() if stage == 3 and not hasattr(p, "ds_id")]
        if got != stage or unsplit:
            raise ConfigError(
                f"DeepSpeed ZeRO stage {stage} was asked for, but {got} came up ({len(unsplit)} parameters are whole)"
            )

    def _before_a_flat_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """DeepSpeed steps on one flat tensor after the other; those of a part that is left out show no gradient meanwhile."""
        flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        self._hidden = [(flat, flat.grad) for flat in flats]
        leave_out(optimizer, self._left_out)

    def _after_a_flat_step(self, *_: Any) -> None:
        for flat, gradient in self._hidden:  # offloaded ones are buffers that it writes to again
            flat.grad = gradient
        self._hidden = []

    def _config(self, module: nn.Module) -> dict[str, Any]:
        config = {
            **self._launch.zero,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": float("inf"),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if self._compute is not None:
            # DeepSpeed ends an autocast that it does not know of. No module's gradients are reduced in 16 bits.
            kind = str(self._compute).removeprefix("torch.")
            config["torch_autocast"] = {"enabled": True, "dtype": kind, "lower_precision_safe_modules": []}
        dtypes = {p.dtype for p in module.parameters()}
        if torch.bfloat16 in dtypes:
            config["bf16"] = {"enabled": True}
        return config

    def _partition(self, module: nn.Module, config: dict[str, Any]) -> None:
        """Splits one parameter after the other: DeepSpeed's engine would first move the whole model to every device."""
        if "bf16" in config:  # as the engine does with a model that is not split yet
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        self._deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.processes.device)

    def _link_moments(self) -> None:
        """Stage 2 lets its parameters know of their moments once, at the first step of the first group, where other groups have none."""
        if not self.shards_parameters:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _flats(self) -> list[list[Tensor]]:
        """The flat tensors of this process, by group of the optimizer: what it steps on."""
        if not self.shards_parameters:
            return [[flat] for flat in self._zero.single_partition_of_fp32_groups]
        groups: list[list[Tensor]] = [[] for _ in self._names]
        for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            groups[self._zero.sub_group_to_group_id[number]].append(flat)
        return groups

    def _flat_groups(self) -> Iterator[tuple[str, Tensor, list[Tensor] | None]]:
        """(part, flat tensor, its gradients in pieces; None where they are its own `.grad`, as when offloaded)."""
        number = 0
        for group, flats in zip(self.optimizer.param_groups, self._flats()):
            for flat in flats:
                yield group["part"], flat, self._zero.averaged_gradients.get(number)
                number += 1

    def _steps(self) -> dict[str, Tensor]:
        """Parameter -> the optimizer's count of its steps; without those that had none."""
        found: dict[str, Tensor] = {}
        for names, flats in zip(self._names, self._flats()):
            state = next((s for flat in flats if (s := self.optimizer.state.get(flat))), None)
            if state:
                found |= dict.fromkeys(names, torch.as_tensor(state["step"]))
        return found

    @staticmethod
    def _shape(parameter: Any) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _import_deepspeed(device: torch.device) -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"the launcher asks for DeepSpeed, which can't be imported ({error}): pip install 'llmrl[deepspeed]', or launch with "
            "recipes/accelerate/fsdp2.yaml"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # A collective in shared memory that it would compile for a minute and a half; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
