"""Errors that llmrl raises on purpose. Each message says what was given, why it can't work and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


class LLMRLError(Exception):
    """Base of every error that llmrl raises on purpose."""


class ConfigError(LLMRLError):
    """A recipe, an override or a combination of settings that can't work."""


class DataError(LLMRLError):
    """A data file, a row or a column that can't be trained or evaluated on."""


class RolloutError(LLMRLError):
    """A rollout engine that failed, or answered with something that can't be trained on."""


class SyncError(RolloutError):
    """An engine that does not hold the weights which it was sent."""


class RewardError(LLMRLError):
    """A reward function that can't be loaded, raised, ran out of time or returned the wrong thing."""


class DivergenceError(LLMRLError):
    """Training left the finite numbers, or sampler and trainer disagree beyond the bound."""


class LostProcessError(LLMRLError):
    """Another process of the run died, failed or hangs; the message says where each one stands."""


def together(action: Callable[[], R], gather: Callable[[Any], list[Any]]) -> R:
    """`action()`; when it fails on one process, all of them raise, so that none waits for the others until the time limit.

    `gather` gives every process's value, by rank, on every process. The process that failed raises its own error, the others an
    LLMRLError that says whose error it was.
    """
    try:
        result = action()
    except Exception as error:
        gather(f"{type(error).__name__}: {error}")
        raise
    failed = {rank: text for rank, text in enumerate(gather(None)) if text is not None}
    if failed:
        raise LLMRLError("; ".join(f"process {rank} failed: {text}" for rank, text in failed.items()))
    return result
