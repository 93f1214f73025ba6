"""Rewards for the length and the variety of a completion, counted in its tokens. Linear, run in the training process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from llmrl.rewards.base import row_verifier


def _check_overlong(*, max_completion_len: int, soft_punish_cache: int) -> str | None:
    if not 0 <= soft_punish_cache <= max_completion_len:
        return (
            f"soft_punish_cache {soft_punish_cache} must be from 0 to max_completion_len, which is {max_completion_len}"
        )
    return None


@row_verifier(safe=True, check_args=_check_overlong)
def soft_overlong(completion_ids: Sequence[int], *, max_completion_len: int, soft_punish_cache: int) -> float:
    """0 up to max_completion_len - soft_punish_cache tokens, from there down linearly to -1 at max_completion_len and beyond.

    DAPO, equation 13 (arXiv 2503.14476). Example: 18,432 tokens with limit 20,480 and cache 4,096 give -0.5.
    """
    length, start = len(completion_ids), max_completion_len - soft_punish_cache
    if length <= start:
        return 0.0
    return -1.0 if length > max_completion_len else (start - length) / soft_punish_cache


def _check_length(*, target: int, kind: str = "equal", upper: int | None = None) -> str | None:
    if target < 1 or kind not in ("equal", "at_most", "at_least", "between"):
        return f"target must be at least 1 and kind equal, at_most, at_least or between; given {target} and {kind!r}"
    if (upper is None) == (kind == "between") or (upper is not None and upper < target):
        return f"`between` takes the lengths from target to upper, and no other kind takes upper; given {target}, {upper} and {kind!r}"
    return None


@row_verifier(safe=True, check_args=_check_length)
def length(
    completion_ids: Sequence[int], *, target: int, kind: Literal["equal", "at_most", "at_least", "between"] = "equal",
    upper: int | None = None,
) -> float:  # fmt: skip
    """Minus the distance to `target` tokens as a share of it, at least -1; `at_most` and `at_least` count one side only, and `between`
    the distance to the lengths from `target` to `upper`."""
    size = len(completion_ids)
    over, under = max(0, size - (target if upper is None else upper)), max(0, target - size)
    miss = {"equal": over + under, "at_most": over, "at_least": under, "between": over + under}[kind]
    return -min(1.0, miss / target) if miss else 0.0


def length_zscore(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Minus the z-score of a completion's tokens within its group, from -3 to 3: shorter than the others is above 0. Completions of
    equal prompts are a group; 0 where all are as long. The std is the population's.

    Example: lengths 10 and 30 of one prompt give 1.0 and -1.0.
    """
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(repr(prompt), []).append(place)
    out = [0.0] * len(prompts)
    for places in groups.values():
        sizes = [len(completion_ids[i]) for i in places]
        mean, std = statistics.fmean(sizes), statistics.pstdev(sizes)
        for place, size in zip(places, sizes, strict=True):
            out[place] = max(-3.0, min(3.0, (mean - size) / std)) if std else 0.0
    return out


def _check_repetition(*, ngram_size: int = 3, max_penalty: float = -1.0) -> str | None:
    if ngram_size < 1 or max_penalty > 0:
        return f"ngram_size must be at least 1 and max_penalty at most 0; given {ngram_size} and {max_penalty}"
    return None


@row_verifier(safe=True, check_args=_check_repetition)
def repetition_penalty(completion_ids: Sequence[int], *, ngram_size: int = 3, max_penalty: float = -1.0) -> float:
    """max_penalty times the share of n-grams of tokens that repeat an earlier one; 0 below n tokens (arXiv 2502.03373, appendix C.2).

    Example: tokens 5 5 5 5 5 with ngram_size 2 give -0.75.
    """
    total = len(completion_ids) - ngram_size + 1
    if total < 1:
        return 0.0
    ngrams = set(zip(*(completion_ids[i:] for i in range(ngram_size)), strict=False))
    repeated = 1 - len(ngrams) / total
    return repeated * max_penalty if repeated else 0.0
