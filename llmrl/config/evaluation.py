"""What `llmrl eval` runs."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

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
    temperature: float = Field(
        0.0,
        ge=0,
        description="divides the logits; 0 is greedy; default with n above 1: 1, since greedy ones are all the same",
    )
    max_completion_length: int = Field(512, ge=1, description="tokens sampled at most")
    scorer: RewardSpec = Field(
        RewardSpec(function="math_answer"), description="what judges a completion: a reward function"
    )
    allow_code_execution: bool = Field(
        False, description="let the scorer run programs that the model wrote, in a sandbox (docs/code.md)"
    )
    threshold: float = Field(0.5, description="a completion is right when the scorer gives at least this")
    system_prompt: str | None = Field(
        None, description="put before conversations that have none; makes a conversation of a plain prompt"
    )
    batch_size: int = Field(64, ge=1, description="prompts sampled at once")
    rollout: RolloutSettings = Field(RolloutSettings(), description="the engine")

    @model_validator(mode="before")
    @classmethod
    def _sample_for_several(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("n"), int) and data["n"] > 1:
            return {"temperature": 1.0, **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"temperature 0 gives n={self.n} equal completions of each problem, which say no more than one; use n=1, or a "
                "temperature above 0"
            )
        return self
