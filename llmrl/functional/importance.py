"""Correction for engines whose sampling log-probs differ from the trainer's own, and how far apart the two are."""

from __future__ import annotations

import torch
from torch import Tensor


def importance_weights(old_logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_engine, cap) a token [K], detached: truncated importance sampling (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"). Multiply the advantages by it."""
    return (old_logprobs - sampled_logprobs).detach().exp().clamp(max=cap)


def sampling_stats(
    old_logprobs: Tensor, sampled_logprobs: Tensor, weights: Tensor, token_share: float
) -> dict[str, Tensor]:
    """|old - sampled| log-probs and the untruncated ratio, under TRL's metric names.

    Means are sums over `token_share` (1 / tokens of the update over all processes), so that they add up over microbatches;
    "/min" and "/max" reduce by minimum and maximum. Tokens of weight 0 (a microbatch that only keeps a process in step) do not
    count.
    """
    counted = weights != 0
    log_ratio = (old_logprobs - sampled_logprobs).detach()[counted]
    gap, ratio = log_ratio.abs(), log_ratio.exp()
    none = gap.new_zeros(1)
    return {
        "sampling/sampling_logp_difference/mean": gap.sum() * token_share,
        "sampling/sampling_logp_difference/max": torch.cat([gap, none]).amax(),
        "sampling/importance_sampling_ratio/mean": ratio.sum() * token_share,
        "sampling/importance_sampling_ratio/min": torch.cat([ratio, none + torch.inf]).amin(),
        "sampling/importance_sampling_ratio/max": torch.cat([ratio, none]).amax(),
    }
