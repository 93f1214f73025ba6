"""Advantages of completions relative to the others of their group: a baseline, then a scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Groups:
    """Rewards [M] that are there, with what the hooks need: the group index, and a group's size, mean and flatness, each [M]."""

    rewards: Tensor
    index: Tensor
    size: Tensor
    mean: Tensor
    flat: Tensor  # all rewards of the group are exactly equal (also in a group of one)
    ddof: int


def _group_mean(g: _Groups) -> Tensor:
    # exactly 0 where all rewards are equal: their mean may differ from each of them in the last digit
    return torch.where(g.flat, 0.0, g.rewards - g.mean)


def _leave_one_out(g: _Groups) -> Tensor:
    return _group_mean(g) * g.size / (g.size - 1).clamp(min=1)


BASELINES: dict[str, Callable[[_Groups], Tensor]] = {
    "group_mean": _group_mean,
    "leave_one_out": _leave_one_out,  # r_i - mean of the others (RLOO, Ahmadian et al. 2024, arXiv 2402.14740)
    "none": lambda g: g.rewards,
}


def _std(values: Tensor, mean: Tensor, size: Tensor, index: Tensor, ddof: int) -> Tensor:
    squares = torch.zeros_like(values).index_add(0, index, (values - mean).square())
    return (squares[index] / (size - ddof).clamp(min=1)).sqrt()


def _group_std(g: _Groups) -> Tensor:
    # a group without spread has no scale; infinity makes its advantage 0 whatever the baseline
    return torch.where(g.flat, torch.inf, _std(g.rewards, g.mean, g.size, g.index, g.ddof))


def _batch_std(g: _Groups) -> Tensor:
    one = torch.zeros_like(g.index)
    std = _std(g.rewards, g.rewards.mean(), one + len(one), one, g.ddof)
    return torch.where(g.rewards.amax() == g.rewards.amin(), torch.inf, std)


# the divisor, before eps is added; None divides by nothing (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783)
SCALES: dict[str, Callable[[_Groups], Tensor] | None] = {"group": _group_std, "batch": _batch_std, "none": None}


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    scale: str = "group",
    baseline: str = "group_mean",
    eps: float = 1e-4,
    ddof: int = 1,
) -> Tensor:
    """(r - baseline) / (std + eps) [N] of rewards [N], with groups [N] int64 saying which completions belong together.

    GRPO's advantage (Shao et al. 2024, arXiv 2402.03300, section 4.1.2). `scale` is the std of the group, of the batch (all rewards
    of the call) or none; std divides by n - ddof; ddof 1 and eps 1e-4 are TRL's. A NaN reward (no reward function applied)
    stays out of the baseline and the std and gets advantage 0. A group whose rewards are exactly equal, or of one, gets exactly 0 unless
    baseline and scale are "none". Raises ValueError for unknown names and infinite rewards.

    Example: rewards [1, 0, 0, 1] of one group, eps 0 -> [0.866, -0.866, -0.866, 0.866]
    """
    if scale not in SCALES or baseline not in BASELINES:
        raise ValueError(
            f"unknown scale {scale!r} or baseline {baseline!r}; known: {', '.join(SCALES)} and {', '.join(BASELINES)}"
        )
    if rewards.isinf().any():
        raise ValueError(
            f"{int(rewards.isinf().sum())} of {len(rewards)} rewards are infinite; give finite ones, or NaN for none"
        )
    out = torch.zeros_like(rewards)
    there = ~rewards.isnan()
    if not there.any():
        return out
    r = rewards[there]
    unique, index = groups[there].unique(return_inverse=True)
    zeros = r.new_zeros(len(unique))
    size = torch.bincount(index)
    mean = zeros.index_add(0, index, r) / size
    top, bottom = (zeros.scatter_reduce(0, index, r, how, include_self=False) for how in ("amax", "amin"))
    g = _Groups(r, index, size[index], mean[index], (top == bottom)[index], ddof)
    centred, divisor = BASELINES[baseline](g), SCALES[scale]
    out[there] = centred if divisor is None else centred / (divisor(g) + eps)
    return out
