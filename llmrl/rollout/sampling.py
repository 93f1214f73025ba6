"""Drawing tokens: the random numbers of a row, and the distribution that they are drawn from.

Every (row, token) has one uniform number, fixed by (seed, step, prompt id, sample index) and the token's place. Tokens come from it by
inverting the cumulative distribution, so a rollout does not depend on what else is in the batch, on the order or on the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from llmrl.types import Sampling

_BLOCK = 128
"""Vocabulary entries a block: the inverse is looked up among block sums, then inside one block."""
_HEAD = 1024
"""Entries that top-p looks at before it sorts a whole vocabulary."""


def uniforms(sampling: Sampling, prompt_id: str, index: int) -> Iterator[float]:
    """The random numbers of one row in [0, 1), in float64 and without an end: the i-th is for its i-th token."""
    key = f"{sampling.seed}\0{sampling.step}\0{index}\0{prompt_id}".encode()
    digest = hashlib.blake2b(key, digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    while True:
        yield from generator.random(64).tolist()


def group_seed(sampling: Sampling, prompt_id: str) -> int:
    """Seed of a prompt's group, below 2^62, for engines that draw by themselves and add the sample's index to it, as vLLM does."""
    key = f"{sampling.seed}\0{sampling.step}\0{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 2


def draw(logits: torch.Tensor, sampling: Sampling, u: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row: logits [B, V], u [B] float64 -> (tokens [B] int64, logprobs [B]).

    The distribution is softmax(logits / temperature), cut to the `top_k` likeliest tokens, then to the likeliest ones whose
    probabilities (among those left) first add up to `top_p`, then to those of at least `min_p` times the largest one
    (Nguyen et al. 2024, arXiv 2407.01082), and renormalised. Tokens that tie with the last one kept are kept too. `logprobs` are of this
    distribution; at temperature 0 the token is the likeliest one (the first of equals) and its log-prob is the one at temperature 1.
    A row whose logits hold NaN or +inf, or only -inf, gets token -1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.temperature == 0:
        top, tokens = logits.max(-1)
        logprobs = top - torch.logsumexp(logits, -1)
        return torch.where(logprobs.isfinite(), tokens, -1), logprobs
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).div_(sampling.temperature).exp_()  # relative to the largest, which is 1
    weights = _truncate(weights, sampling)
    assert u is not None
    tokens, total = _invert(weights, u)
    logprobs = (weights.gather(1, tokens[:, None]).squeeze(1) / total).log()
    return torch.where(logprobs.isfinite(), tokens, -1), logprobs


def _truncate(weights: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Zeroes the weights [B, V] (the largest is 1) below the bounds of top-k, top-p and min-p."""
    bound = torch.zeros_like(weights[:, :1])
    if 0 < sampling.top_k < weights.shape[1]:
        bound = weights.topk(sampling.top_k).values[:, -1:]
        weights = weights.where(weights >= bound, 0.0)
    if sampling.top_p < 1:
        bound = torch.maximum(bound, _nucleus_bound(weights, sampling.top_p))
    if sampling.min_p > 0:
        bound = bound.clamp(min=sampling.min_p)
    return weights.where(weights >= bound, 0.0) if sampling.truncated_support else weights


def _nucleus_bound(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """[B, 1]: the smallest weight in the nucleus (Holtzman et al. 2020, arXiv 1904.09751)."""
    needed = top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)
    head = weights.topk(min(_HEAD, weights.shape[1])).values
    if head.shape[1] < weights.shape[1] and not bool((head.sum(-1, keepdim=True, dtype=torch.float64) >= needed).all()):
        head = weights.sort(-1, descending=True).values
    before = head.cumsum(-1, dtype=torch.float64) - head
    size = (before < needed).sum(-1, keepdim=True).clamp(min=1)
    return head.gather(1, size - 1)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token whose cumulative weight exceeds u * total, which is never one of weight 0; total [B] float64.

    Two levels: a running sum over the whole vocabulary is slow, and in float32 it would lose the tail.
    """
    vocab = weights.shape[1]
    if vocab % _BLOCK:
        weights = F.pad(weights, (0, -vocab % _BLOCK))
    blocks = weights.unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(-1).double()
    block, rest = _pick(sums, u[:, None].to(sums.device))
    inside = blocks[torch.arange(len(blocks), device=weights.device), block.squeeze(1)].double()
    token, _ = _pick(inside, rest)
    tokens = (block * _BLOCK + token).squeeze(1)
    return tokens.clamp(max=vocab - 1), sums.sum(-1)  # a row of NaN finds no token


def _pick(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weights [B, n], u [B, 1] in [0, 1) -> the first index whose running sum exceeds u * total, and how far into it u lies."""
    running = weights.cumsum(-1)
    total = running[:, -1:]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(running, target, right=True).clamp(max=weights.shape[1] - 1)
    mass = weights.gather(1, index)
    rest = (target - (running.gather(1, index) - mass)) / mass
    return index, rest.clamp(0, 1 - 2**-53)
