"""The batch algebra of a recipe, solved on its data: what a step holds, how it is cut, and how many steps there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrl.config.grpo import GRPOConfig
from llmrl.config.sft import SFTConfig
from llmrl.data.packing import cut, shard
from llmrl.data.sampler import Sampler
from llmrl.types import Example

SIMULATED_STEPS = 20


@dataclass(frozen=True)
class Plan:
    """What a run by this recipe does. For GRPO, token counts suppose that every completion reaches the limit."""

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


def solve(config: SFTConfig | GRPOConfig, lengths: Sequence[int], processes: int = 1) -> Plan:
    """Cuts the first steps as the trainer will. `lengths` are tokens of the examples (SFT) or prompts (GRPO)."""
    steps = config.max_steps or math.ceil(config.num_train_epochs * len(lengths) / config.batch_size)
    generations = config.num_generations if isinstance(config, GRPOConfig) else 1
    completion = config.max_completion_length if isinstance(config, GRPOConfig) else 0
    iterations = config.num_iterations if isinstance(config, GRPOConfig) else 1
    sampler = Sampler(len(lengths), seed=config.seed, shuffle=config.shuffle)
    tokens: list[int] = []
    counts: list[int] = []  # microbatches of one step on its busiest process
    sizes: list[int] = []
    for _ in range(min(steps, SIMULATED_STEPS)):
        rows = [lengths[i] + completion for i in sampler.take(config.batch_size)]
        tokens.append(sum(rows) * generations)
        cuts = [_microbatches(config, rows, generations, rank, processes) for rank in range(processes)]
        counts.append(max(map(len, cuts)))
        sizes += [size for sizes_of_rank in cuts for size in sizes_of_rank]
    sequences = config.batch_size * generations
    slot = max(lengths) + completion
    decode_rows = 0
    if isinstance(config, GRPOConfig):
        decode_rows = max(
            1, min(math.ceil(config.batch_size / processes) * generations, config.rollout.max_batch_tokens // slot)
        )
    return Plan(
        steps=steps,
        updates=steps * config.updates_per_step * iterations,
        rows_per_step=config.batch_size,
        sequences_per_step=sequences,
        tokens_per_step=max(tokens),
        max_microbatches=max(counts),
        mean_microbatches=float(np.mean(counts)),
        largest_microbatch=max(sizes),
        fill=sum(sizes) / (len(sizes) * config.tokens_per_microbatch),
        cache_tokens=decode_rows * slot,
        decode_rows=decode_rows,
    )


def _microbatches(
    config: SFTConfig | GRPOConfig, rows: Sequence[int], generations: int, rank: int, processes: int
) -> list[int]:
    """Tokens of each microbatch of one process in one pass over a step's batch."""
    out = []
    for part in range(config.updates_per_step):
        indices = np.array_split(np.arange(len(rows)), config.updates_per_step)[part].tolist()
        if isinstance(config, GRPOConfig):  # every process trains on the groups that it sampled
            mine = [_blank(rows[i], i) for i in indices if i % processes == rank for _ in range(generations)]
        else:
            mine = shard([_blank(rows[i], i) for i in indices], rank, processes)
        mine = [Example(e.input_ids, e.loss_mask, unit=unit) for unit, e in enumerate(mine)]
        out += [sum(map(len, batch)) for batch in cut(mine, config.tokens_per_microbatch)]
    return out


def _blank(length: int, unit: int) -> Example:
    return Example(np.zeros(length, dtype=np.int32), np.zeros(length, dtype=bool), unit=unit)
