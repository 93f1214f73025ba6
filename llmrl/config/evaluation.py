"""What `llmrl eval` runs."""

from __future__ import annotations

from pydantic import Field

from llmrl.config.base import Strict
from llmrl.config.data import Sources
from llmrl.config.model import ModelFields
from llmrl.config.reward import RewardSpec
from llmrl.config.rollout import RolloutSettings, SamplingFields


class EvalConfig(ModelFields, SamplingFields):
    """Accuracy of a model on a file of problems: a completion is right when the scorer gives it at least `threshold`."""

    data: Sources
    output: str | None = Field(None, description="results JSON; default: printed only")
    n: int = Field(1, ge=1, description="completions a problem")
    seed: int = 0
    temperature: float = Field(0.0, ge=0)
    max_completion_length: int = Field(512, ge=1)
    scorer: RewardSpec = RewardSpec(function="math_answer")
    threshold: float = 0.5
    system_prompt: str | None = None
    batch_size: int = Field(64, ge=1, description="prompts sampled at once")
    rollout: RolloutSettings = RolloutSettings()


__all__ = ["EvalConfig", "Strict"]
