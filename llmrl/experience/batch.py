"""From scored rollouts to weighted training examples, and the numbers of a step that people watch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llmrl.experience.collect import Experience, Gather
from llmrl.experience.offpolicy import is_fresh
from llmrl.functional.advantages import RunningMean, group_advantages
from llmrl.functional.aggregate import token_weights
from llmrl.functional.masks import GlobalSum
from llmrl.types import Example, ScoredRollout


def compute_advantages(
    experience: Experience,
    penalties: Sequence[float],
    *,
    baseline: str,
    scale: str,
    gather: Gather,
    running_mean: RunningMean,
) -> list[float]:
    """One advantage a rollout of this process, in order; for baseline and scale see `group_advantages`.

    `penalties` (one a rollout) are taken off the rewards first. Rewards of all processes are gathered, so that a scale of the batch is
    that of the whole step. `running_mean` is used, then updated, where it is the baseline.
    """
    penalty = iter(penalties)
    local = [
        [g.index, [None if r.reward is None else r.reward - p for r, p in zip(g.rollouts, penalty)]]
        for g in experience.groups
    ]
    everyone = sorted((pair for part in gather(local) for pair in part), key=lambda pair: pair[0])
    rewards = torch.tensor([math.nan if r is None else float(r) for _, rs in everyone for r in rs], dtype=torch.float64)
    groups = [g for g, rs in everyone for _ in rs]
    if not groups:
        return []
    values = group_advantages(
        rewards, torch.tensor(groups), scale=scale, baseline=baseline, running_mean=running_mean.value
    )
    if baseline == "running_mean":
        running_mean.update(rewards)
    by_group: dict[int, list[float]] = {}
    for g, a in zip(groups, values.tolist()):
        by_group.setdefault(g, []).append(a)
    return [a for group in experience.groups for a in by_group[group.index]]


def to_examples(
    experience: Experience, *, unit_tokens: int, mask_truncated: bool = False, version: int | None = None
) -> list[Example]:
    """One example a rollout, in order, with the payload `sampled_logprobs`; the loss sees completion tokens only.

    Completions of a group share their prompt (`Example.prefix`), which is then computed once for all of them; a group is divided so
    that no unit has more than `unit_tokens` tokens (0: no completion shares). With `mask_truncated`, a completion that the token limit
    cut has no token in the loss, and counts in no denominator (DAPO's overlong filtering, arXiv 2503.14476). Given the `version` of the
    weights of now, the scalar `fresh` is 1 for completions that it sampled and 0 for staler ones.
    """
    out: list[Example] = []
    unit, used = -1, 0
    for group in experience.groups:
        used = unit_tokens + 1  # nothing of another group's unit
        for scored in group.rollouts:
            size = len(scored.rollout.completion.ids)
            shares = 0 < size <= unit_tokens - used
            if not shares:
                unit, used = unit + 1, len(scored.rollout.prompt.ids)
            used += size
            out.append(to_example(scored, unit, shares=shares, mask_truncated=mask_truncated, version=version))
    return out


def to_example(
    scored: ScoredRollout, unit: int, *, shares: bool = False, mask_truncated: bool = False, version: int | None = None
) -> Example:
    """Prompt and completion end to end, or the completion alone behind its unit's prompt; see `to_examples`."""
    prompt, completion = scored.rollout.prompt.ids, scored.rollout.completion
    own = () if shares else prompt
    n, length = len(own), len(own) + len(completion.ids)
    loss_mask = np.zeros(length, dtype=bool)
    loss_mask[n:] = not (mask_truncated and completion.finish_reason == "length")
    sampled = np.zeros(length, dtype=np.float32)
    sampled[n:] = completion.sampled_logprobs
    return Example(
        input_ids=np.asarray(own + completion.ids, dtype=np.int32),
        loss_mask=loss_mask,
        unit=unit,
        payload={"sampled_logprobs": sampled},
        id=f"{scored.rollout.prompt.id}/{scored.rollout.index}",
        prefix=len(prompt) if shares else 0,
        scalars={} if version is None else {"fresh": float(is_fresh(completion, version))},
    )


def with_advantage(example: Example, advantage: float) -> Example:
    """The example with the same advantage at each of its tokens in the loss."""
    return with_payload(example, advantages=np.where(example.loss_mask, np.float32(advantage), np.float32(0)))


def sum_of(example: Example, name: str) -> float:
    """The sum of a payload over the tokens in the loss."""
    return float(example.payload[name][example.loss_mask].sum(dtype=np.float64))


def split_updates(
    experience: Experience, examples: Sequence[Example], updates: int, gather: Gather
) -> list[list[Example]]:
    """This process's examples (one a rollout, in order) of each of a step's `updates`.

    Whole groups, in blocks of their order over all processes: so each update has groups of every process.
    """
    kept = sorted(index for part in gather([g.index for g in experience.groups]) for index in part)
    turn = {int(index): u for u, block in enumerate(np.array_split(kept, updates)) for index in block}
    turns = [turn[g.index] for g in experience.groups for _ in g.rollouts]
    return [[e for e, t in zip(examples, turns, strict=True) if t == u] for u in range(updates)]


def with_payload(example: Example, **values: np.ndarray) -> Example:
    """The example with further payloads, each [L]."""
    return replace(example, payload={**example.payload, **values})


def scatter(examples: Sequence[Example], selected: torch.Tensor) -> list[np.ndarray]:
    """Takes [K] values at the loss positions of `examples`, in order, apart: one [L] array an example, 0 elsewhere."""
    flat = selected.detach().cpu().numpy()
    out, start = [], 0
    for example in examples:
        values = np.zeros(len(example), dtype=flat.dtype)
        count = int(example.loss_mask.sum())
        values[example.loss_mask] = flat[start : start + count]
        out.append(values)
        start += count
    return out


def weigh(examples: Sequence[Example], kind: str, constant: int, global_sum: GlobalSum) -> tuple[list[Example], float]:
    """Adds the `weights` payload of one update and returns the number of loss tokens in it, over all processes.

    `kind` is the aggregation; the denominators count the whole update over all processes, before anything is cut into
    microbatches. `constant` is the L of Dr. GRPO (arXiv 2503.20783).
    """
    lengths = [int(e.loss_mask.sum()) for e in examples]
    tokens, sequences = global_sum([float(sum(lengths)), float(sum(n > 0 for n in lengths))])
    weights = token_weights(kind, lengths, total_tokens=tokens, total_sequences=sequences, constant=constant)
    out = []
    for example, weight in zip(examples, weights):
        values = np.where(example.loss_mask, np.float64(weight), 0.0).astype(np.float32)
        out.append(with_payload(example, weights=values))
    return out, tokens


def rollout_metrics(rollouts: Iterable[ScoredRollout], names: Sequence[str], gather: Gather) -> dict[str, float]:
    """Reward and length statistics of all processes' rollouts of a step, under TRL's metric names.

    Give it those of dropped groups too: what dynamic sampling keeps has rewards around the middle whatever the policy is worth.
    `reward_std` is the mean of the groups' own; with one completion a prompt there are no groups, and it is that of all rewards.
    """
    local = [
        [r.rollout.prompt.id, r.reward, len(r.rollout.completion.ids), r.rollout.completion.finish_reason == "length",
         [r.parts.get(n) for n in names]]
        for r in rollouts
    ]  # fmt: skip
    rows = [row for part in gather(local) for row in part]
    if not rows:
        return {}
    lengths = [row[2] for row in rows]
    rewards = [row[1] for row in rows if row[1] is not None]
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row[1] is not None:
            groups.setdefault(row[0], []).append(row[1])
    finished = [row[2] for row in rows if not row[3]]
    metrics = {
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(row[3] for row in rows) / len(rows),
    }
    grouped = len({row[0] for row in rows}) < len(rows)
    if grouped:
        metrics["frac_reward_zero_std"] = float(np.mean([len(set(g)) == 1 for g in groups.values()])) if groups else 0.0
    if finished:
        metrics["completions/mean_terminated_length"] = float(np.mean(finished))
    if rewards:
        metrics["reward"] = float(np.mean(rewards))
        spreads = [float(np.std(g, ddof=1)) if len(g) > 1 else 0.0 for g in groups.values()]
        metrics["reward_std"] = float(np.mean(spreads) if grouped else np.std(rewards, ddof=min(len(rewards) - 1, 1)))
    for i, name in enumerate(names):
        values = [row[4][i] for row in rows if row[4][i] is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = float(np.mean(values))
            metrics[f"rewards/{name}/std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return metrics


def merge_reward_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One process's `Experience.reward_metrics` each: outcomes add up, seconds are those of the slowest, what a function logged is averaged."""
    merged: dict[str, float] = {}
    for name in sorted({name for part in parts for name in part}):
        values = [part[name] for part in parts if name in part]
        if name.startswith("reward_outcomes/"):
            merged[name] = sum(values)
        else:
            merged[name] = max(values) if name.startswith("reward_seconds/") else sum(values) / len(values)
    return merged


def merge_update_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The statistics of a step's updates as one: means, but the least of "*/min", the greatest of "*/max", the last rate.

    Updates that were not made (nothing was left in their loss) are empty and don't count; a step without any has loss 0. A number that
    only some updates have is one of those.
    """
    merged = {"loss": 0.0}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in updates if name in update]
        kind = "last" if name == "learning_rate" else name.rpartition("/")[2]
        merged[name] = {"last": values[-1], "min": min(values), "max": max(values)}.get(kind, sum(values) / len(values))
    return merged


def sample_rows(rollouts: Sequence[ScoredRollout], advantages: Sequence[float]) -> list[Mapping[str, Any]]:
    """What `samples/step_*.jsonl` holds, a row a completion."""
    return [
        {
            "prompt_id": r.rollout.prompt.id,
            "prompt": r.rollout.prompt.text,
            "completion": r.rollout.completion.text,
            "reward": r.reward,
            "parts": dict(r.parts),
            "outcomes": dict(r.outcomes),
            "milliseconds": {name: round(1000 * s, 3) for name, s in r.seconds.items()},
            "notes": dict(r.notes),
            "advantage": a,
            "length": len(r.rollout.completion.ids),
            "finish_reason": r.rollout.completion.finish_reason,
            "version": r.rollout.completion.version,
            **({"extra": dict(r.extra)} if r.extra else {}),
        }
        for r, a in zip(rollouts, advantages)
    ]
