"""Correction for rollouts that another policy than the one in training sampled, and how far apart the two are.

Three policies: `sampled` drew the tokens (an engine with its own rounding, or with older weights), `old` is the trainer's before the
step's updates, and the current one moves away from it in them. The loss is that of decoupled PPO (Hilton et al. 2022, "Batch
size-invariance for policy optimization", arXiv 2110.00641; for language models AReaL, arXiv 2505.24298):

    (old / sampled) min(rho A, clip(rho) A),   rho = current / old

The clip keeps the update near `old`, however stale the samples are; old / sampled makes the expectation over samples one over old's
tokens. With one update a step, rho is 1 and its gradient that of log pi, whoever sampled: `old` may then be the current log-probs,
detached, so that the gradient is (old / sampled) A grad log pi.

Per token, the ratio corrects the choice of that token but not how often `sampled` came to the tokens before it, as in PPO itself: what
is left grows with the staleness and the length. Truncation bounds the variance and gives up some of the correction. KL and entropy
terms and a critic's loss are not weighted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_MEAN, _SQUARE = "sampling/importance_weight/mean", "sampling/importance_weight/mean_square"
_FRESH, _FRESH_GAP = "sampling/fresh_ratio", "sampling/fresh_logp_difference/sum"


def importance_weights(old_logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_engine, cap) a token [K], detached: truncated importance sampling (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training"). Multiply the advantages by it."""
    return (old_logprobs - sampled_logprobs).detach().exp().clamp(max=cap)


def sampling_stats(
    old_logprobs: Tensor,
    sampled_logprobs: Tensor,
    weights: Tensor,
    token_share: float,
    *,
    cap: float | None = None,
    fresh: Tensor | None = None,
) -> dict[str, Tensor]:
    """|old - sampled| log-probs and the untruncated ratio, under TRL's metric names.

    Means are sums over `token_share` (1 / tokens of the update over all processes), so that they add up over microbatches;
    "/min" and "/max" reduce by minimum and maximum. Tokens of weight 0 (a microbatch that only keeps a process in step) do not
    count.

    With the `cap` of `importance_weights`, the sums that `sampling_summary` makes the effective sample size of; with `fresh` [K], which
    is 1 for tokens of completions that the current weights sampled and 0 for others, those of their difference.
    """
    counted = weights != 0
    log_ratio = (old_logprobs - sampled_logprobs).detach()[counted]
    gap, ratio = log_ratio.abs(), log_ratio.exp()
    none = gap.new_zeros(1)
    stats = {
        "sampling/sampling_logp_difference/mean": gap.sum() * token_share,
        "sampling/sampling_logp_difference/max": torch.cat([gap, none]).amax(),
        "sampling/importance_sampling_ratio/mean": ratio.sum() * token_share,
        "sampling/importance_sampling_ratio/min": torch.cat([ratio, none + torch.inf]).amin(),
        "sampling/importance_sampling_ratio/max": torch.cat([ratio, none]).amax(),
    }
    if cap is not None:
        used = ratio.clamp(max=cap)
        stats["sampling/importance_capped"] = (ratio > cap).sum(dtype=gap.dtype) * token_share
        stats[_MEAN], stats[_SQUARE] = used.sum() * token_share, used.square().sum() * token_share
    if fresh is not None:
        of_now = fresh[counted] > 0
        stats[_FRESH], stats[_FRESH_GAP] = of_now.sum(dtype=gap.dtype) * token_share, gap[of_now].sum() * token_share
    return stats


def sampling_summary(stats: Mapping[str, float]) -> dict[str, float]:
    """The statistics of a whole update, over all processes, with what is no sum.

    `sampling/ess` is the effective sample size of the weights as they were used, as a share of the tokens: (sum w)^2 / (n sum w^2)
    (Kish 1965), 1 when all are equal and 1 / n when one token has all the weight. `sampling/fresh_logp_difference/mean` is the difference over
    fresh tokens alone, and absent without any; `sampling/fresh_ratio` is their share.
    """
    out = {name: value for name, value in stats.items() if name not in (_MEAN, _SQUARE, _FRESH_GAP)}
    if _SQUARE in stats:
        mean, square = stats[_MEAN], stats[_SQUARE]
        out["sampling/ess"] = min(mean * mean / square, 1.0) if square else 0.0  # above 1 by rounding alone
    if stats.get(_FRESH):
        out["sampling/fresh_logp_difference/mean"] = stats[_FRESH_GAP] / stats[_FRESH]
    return out
