"""Estimators of KL(policy || reference) from the log-probs of sampled tokens (Schulman 2020, "Approximating KL divergence").

With d = logprob - ref_logprob of a token sampled from the policy. As a term of the loss their gradients differ more than their
values. On policy, that of k2, d * grad logprob, is an unbiased estimate of the gradient of KL(policy || reference); that of k3,
(1 - ref / policy) * grad logprob, is one of the gradient of KL(reference || policy); that of k1, grad logprob, has mean zero
and says nothing, so k1 belongs in a reward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d: unbiased, of either sign, high variance."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased, never negative; GRPO's (Shao et al. 2024, arXiv 2402.03300, equation 4)."""
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """One estimate a token [K], in nats, by `kind`: k1, k2 or k3. Raises ValueError for another kind."""
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {kind!r}; known: {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[kind](logprobs, ref_logprobs)
