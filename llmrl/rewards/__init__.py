"""Reward functions, and the runner that keeps them from stopping or falsifying a run. Loads no torch.

`row_verifier` declares a function that scores one row; `RewardRunner` scores rollouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmrl.rewards.base import Noted, RowVerifier, row_verifier

if TYPE_CHECKING:
    from llmrl.rewards.runner import BadGold, RewardRunner

__all__ = ["BadGold", "Noted", "RewardRunner", "RowVerifier", "row_verifier"]


def __getattr__(name: str) -> Any:
    # Lazily: a worker needs the decorator, and neither pydantic nor the runner.
    if name in ("BadGold", "RewardRunner"):
        from llmrl.rewards import runner

        return getattr(runner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
