"""The batch algebra of a recipe, solved on its data: what a step holds, how it is cut, and how many steps there are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from llmrl.config.dpo import DPOConfig
from llmrl.config.grpo import GRPOConfig
from llmrl.config.ppo import PPOConfig
from llmrl.data.build import DatasetConfig
from llmrl.data.packing import cut, shard
from llmrl.data.sampler import Sampler
from llmrl.types import Example

SIMULATED_STEPS = 20
SamplingConfig = GRPOConfig | PPOConfig | DPOConfig


@dataclass(frozen=True)
class Plan:
    """What a run by this recipe does. Where it samples, token counts suppose that every completion reaches the limit.

    `sequences_per_step` are the rollouts (samplers) or rows of a step, `tokens_per_step` what is trained on in the largest one.
    """

    steps: int
    updates: int
    rows_per_step: int
    sequences_per_step: int
    tokens_per_step: int
    max_microbatches: int
    mean_microbatches: float
    largest_microbatch: int
    fill: float
    cache_tokens: int = 0
    decode_rows: int = 0


def samples(config: DatasetConfig) -> TypeGuard[SamplingConfig]:
    """The run makes its own completions. DPO does with rewards, and is offline without."""
    return isinstance(config, GRPOConfig | PPOConfig) or (isinstance(config, DPOConfig) and bool(config.rewards))


def solve(config: DatasetConfig, lengths: Sequence[int], processes: int = 1, *, packed: bool = True) -> Plan:
    """Cuts the first steps as the trainer will. `lengths` are tokens of the rows, of the pairs (both sides), or of the prompts.

    `packed`: the model can be packed, so that completions of a group share their prompt.
    """
    steps = config.max_steps or math.ceil(config.num_train_epochs * len(lengths) / config.batch_size)
    iterations = config.num_iterations if isinstance(config, GRPOConfig | PPOConfig) else 1
    sampler = Sampler(len(lengths), seed=config.seed, shuffle=config.shuffle)
    tokens: list[int] = []
    counts: list[int] = []  # microbatches of one step on its busiest process
    sizes: list[int] = []
    for _ in range(min(steps, SIMULATED_STEPS)):
        rows = [_units(config, lengths[i], packed) for i in sampler.take(config.batch_size)]
        tokens.append(sum(map(sum, rows)))
        cuts = [_microbatches(config, rows, rank, processes) for rank in range(processes)]
        counts.append(max(map(len, cuts)))
        sizes += [size for sizes_of_rank in cuts for size in sizes_of_rank]
    slot = decode_rows = 0
    generations = 1
    if samples(config):
        generations = config.num_generations
        if config.rollout.engine == "local":  # vLLM keeps its own cache
            slot = max(lengths) + config.max_completion_length
            mine = math.ceil(config.batch_size / processes) * generations
            decode_rows = max(1, min(mine, config.rollout.max_batch_tokens // slot))
    return Plan(
        steps=steps,
        updates=steps * config.updates_per_step * iterations,
        rows_per_step=config.batch_size,
        sequences_per_step=config.batch_size * generations,
        tokens_per_step=max(tokens),
        max_microbatches=max(counts),
        mean_microbatches=float(np.mean(counts)),
        largest_microbatch=max(sizes),
        fill=sum(sizes) / (len(sizes) * config.tokens_per_microbatch),
        cache_tokens=decode_rows * slot,
        decode_rows=decode_rows,
    )


def _units(config: DatasetConfig, length: int, packed: bool) -> list[int]:
    """Tokens of each unit that a row or prompt of `length` tokens gives to training."""
    if not samples(config):
        return [length]
    completion = config.max_completion_length
    if isinstance(config, DPOConfig):  # the best and the worst completion, with one prompt
        return [length + 2 * completion]
    together = max(1, (config.tokens_per_microbatch - length) // completion) if packed else 1
    whole, rest = divmod(config.num_generations, together)
    return [length + together * completion] * whole + [length + rest * completion] * (rest > 0)


def _microbatches(config: DatasetConfig, rows: Sequence[Sequence[int]], rank: int, processes: int) -> list[int]:
    """Tokens of each microbatch of one process in one pass over a step's batch."""
    out = []
    for part in range(config.updates_per_step):
        indices = np.array_split(np.arange(len(rows)), config.updates_per_step)[part].tolist()
        if samples(config):  # every process trains on what it sampled
            mine = _blank(n for i in indices if i % processes == rank for n in rows[i])
        else:
            mine = shard(_blank(n for i in indices for n in rows[i]), rank, processes)
        out += [sum(map(len, batch)) for batch in cut(mine, config.tokens_per_microbatch)]
    return out


def _blank(lengths: Iterable[int]) -> list[Example]:
    return [Example(np.zeros(n, np.int32), np.zeros(n, bool), unit) for unit, n in enumerate(lengths)]
