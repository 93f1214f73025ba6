"""AdamW and its learning rate: the rate is a pure function of the update's number, so there is no scheduler to save or to forget."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from llmrl.errors import ConfigError

logger = logging.getLogger("llmrl")
_FINE_RATE = (
    1e-5  # weights are about 0.02, and bfloat16's steps there about 1e-4; AdamW moves a weight by about the rate
)


class OptimFields(Protocol):
    """The keys of a recipe that this file reads (`llmrl.config.train.TrainFields`)."""

    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def lr_scheduler_type(self) -> str: ...
    @property
    def warmup_steps(self) -> int | None: ...
    @property
    def warmup_ratio(self) -> float: ...
    @property
    def min_lr_ratio(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def adam_beta1(self) -> float: ...
    @property
    def adam_beta2(self) -> float: ...
    @property
    def adam_epsilon(self) -> float: ...


def warmup_updates(config: OptimFields, total: int) -> int:
    """Updates of linear warm-up: `warmup_steps` if given, else `warmup_ratio` of all, rounded up."""
    return config.warmup_steps if config.warmup_steps is not None else math.ceil(total * config.warmup_ratio)


def learning_rate_at(config: OptimFields, update: int, total: int) -> float:
    """The rate of update number `update` (from 0) of `total`.

    Update 0 of a warm-up has rate 0 and update `warmup` the peak, as in transformers' schedules; after it the rate falls to
    `min_lr_ratio` of the peak, which update number `total`, one past the last, would have. Beyond that it stays there.
    """
    warmup = warmup_updates(config, total)
    if update < warmup:
        return config.learning_rate * update / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    if config.lr_scheduler_type == "linear":
        share = 1.0 - progress
    elif config.lr_scheduler_type == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        raise ConfigError(
            f"lr_scheduler_type {config.lr_scheduler_type!r} is not known: use constant, linear or cosine"
        )
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, tied ones once. Raises ConfigError when nothing is trainable."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigError(
            "the model has no trainable parameter: every requires_grad is False. Unfreeze some, or attach LoRA"
        )
    return parameters


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices (embeddings too) decay; norm gains, biases and other vectors do not.

    Stacked biases, of experts for instance, have two dimensions, so the name counts as well.
    """
    return parameter.dim() >= 2 and not name.rpartition(".")[2].endswith("bias")


def build_optimizer(module: nn.Module, config: OptimFields, parts: Sequence[str] = ()) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) over the trainable parameters, in groups: with and without decay.

    `parts` are prefixes of parameter names with groups of their own: a group's "part" is its prefix, "" for the rest. Rates are set
    before every update by the caller. `adamw` runs its fused kernel where there is one (CPU and CUDA floats); `adamw_8bit` keeps the
    moments of embeddings in 32 bits, whose gradients, rare and large, fit 8 bits badly (arXiv 2110.02861, section 2.3). Raises
    ConfigError where bitsandbytes, which that needs, is absent.
    """
    parameters = trainable_parameters(module)
    if any(p.dtype == torch.bfloat16 for p in parameters.values()) and config.learning_rate < _FINE_RATE:
        logger.warning(
            "trained parameters are bfloat16 and learning_rate is %g: a step below 1/256 of a weight is rounded away, so most weights will "
            "not move. Use dtype: float32 with mixed_precision: bf16, or a higher rate",
            config.learning_rate,
        )
    part_of = {n: next((part for part in parts if n.startswith(part)), "") for n in parameters}
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    eight = config.optimizer == "adamw_8bit"
    bits_of = {n: 8 if eight and id(p) not in embeddings else 32 for n, p in parameters.items()}
    every = [
        {
            "params": [
                p for n, p in parameters.items() if (part_of[n], decays(n, p), bits_of[n]) == (part, decaying, bits)
            ],
            "weight_decay": config.weight_decay if decaying else 0.0,
            "part": part,
            "optim_bits": bits,  # bitsandbytes' name; torch's optimizer does not look at it
        }
        for part in ("", *parts)
        for decaying in (True, False)
        for bits in (8, 32)
    ]
    groups = [group for group in every if group["params"]]
    betas = (config.adam_beta1, config.adam_beta2)
    if eight:
        return _eight_bit(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters.values())
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=fused)


def _eight_bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    try:
        from llmrl.train.adamw8bit import BlockwiseAdamW
    except ImportError as error:
        raise ConfigError(
            f"optimizer: adamw_8bit needs bitsandbytes, which can't be imported ({error}): `pip install bitsandbytes`, or leave it at adamw"
        ) from error
    return BlockwiseAdamW(groups, **settings)
