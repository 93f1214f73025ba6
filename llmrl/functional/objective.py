"""The token objective of GRPO and its critic-free relatives: surrogate, KL to the reference, entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmrl.functional.kl import kl_estimate
from llmrl.functional.surrogates import clip_fractions, importance_ratio, ppo_clip


@dataclass(frozen=True)
class ObjectiveSettings:
    """The axes of the objective, named as in `GRPOConfig`."""

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    dual_clip: float | None = None
    importance_sampling_level: str = "token"
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = False
    entropy_coef: float = 0.0


def policy_objective(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    sequence: Tensor,
    num_sequences: int,
    token_share: float,
    settings: ObjectiveSettings,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one microbatch, and its share of the update's statistics.

        loss = sum_t w_t [surrogate_t + beta KL_t (rho_t, if use_bias_correction_kl)] - entropy_coef mean_t H_t

    All tensors are [K], over the tokens in the loss: `weights` come from `aggregate.token_weights`, `sequence` from
    `PackedBatch.sequence_of_positions`. The entropy bonus is a mean over the tokens of the update whatever the aggregation, as
    TRL's is: `token_share` is 1 / the number of those tokens, over all processes. Statistics are such sums too, so both losses
    and statistics add up over microbatches and processes; names are TRL's. Tokens of weight 0 (a microbatch that only keeps a
    process in step) count in neither. Raises ValueError if a term's input is missing.
    """
    s = settings
    if s.beta and ref_logprobs is None:
        raise ValueError(f"beta is {s.beta} but there are no ref_logprobs; score the reference first")
    if s.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef is {s.entropy_coef} but there is no entropy; ask the forward for it")
    share = (weights != 0).to(logprobs.dtype) * token_share
    ratio = importance_ratio(logprobs, old_logprobs, sequence, num_sequences, s.importance_sampling_level)
    losses = ppo_clip(
        ratio, advantages, epsilon=s.epsilon, epsilon_high=s.epsilon_high, delta=s.delta, dual_clip=s.dual_clip
    )
    low, high = clip_fractions(ratio, advantages, epsilon=s.epsilon, epsilon_high=s.epsilon_high)
    stats = {
        "clip_ratio/low_mean": (low * share).sum(),
        "clip_ratio/high_mean": (high * share).sum(),
        "clip_ratio/region_mean": ((low | high) * share).sum(),
        "importance_ratio": (ratio.detach() * share).sum(),
    }
    if s.beta and ref_logprobs is not None:
        kl = kl_estimate(logprobs, ref_logprobs, s.kl_estimator)
        if s.use_bias_correction_kl:
            kl = kl * ratio
        losses = losses + s.beta * kl
        stats["kl"] = (kl.detach() * share).sum()
    loss = (weights * losses).sum()
    if entropy is not None:
        mean_entropy = (entropy * share).sum()
        stats["entropy"] = mean_entropy.detach()
        if s.entropy_coef:
            loss = loss - s.entropy_coef * mean_entropy
    return loss, stats
