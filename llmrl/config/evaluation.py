"""What `llmrl eval` runs."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmrl.config.base import Recipe
from llmrl.config.data import Sources
from llmrl.config.model import ModelFields
from llmrl.config.reward import RewardSpec
from llmrl.config.rollout import RolloutSettings, SamplingFields


class EvalConfig(Recipe, ModelFields, SamplingFields):
    """Accuracy of a model on a file of problems: a completion is right when the scorer gives it at least `threshold`."""

    kind: ClassVar[str] = "eval"

    data: Sources = Field(description="problems: a path, or a list of sources")
    output: str | None = Field(None, description="results JSON; default: printed only")
    n: int = Field(1, ge=1, description="completions a problem")
    seed: int = Field(0, description="of the sampling")
    temperature: float = Field(0.0, ge=0, description="divides the logits; 0 is greedy")
    max_completion_length: int = Field(512, ge=1, description="tokens sampled at most")
    scorer: RewardSpec = Field(
        RewardSpec(function="math_answer"), description="what judges a completion: a reward function"
    )
    threshold: float = Field(0.5, description="a completion is right when the scorer gives at least this")
    system_prompt: str | None = Field(
        None, description="put before conversations that have none; makes a conversation of a plain prompt"
    )
    batch_size: int = Field(64, ge=1, description="prompts sampled at once")
    rollout: RolloutSettings = Field(RolloutSettings(), description="the engine")
