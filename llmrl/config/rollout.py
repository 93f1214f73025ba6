"""How completions are sampled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmrl.config.base import Strict


class RolloutSettings(Strict):
    """The engine. `local` samples in the training process, on any device."""

    engine: Literal["local"] = Field("local", description="local: in the training process")
    max_batch_tokens: int = Field(262_144, ge=1, description="local: cache slots (rows x length) decoded at once")


class SamplingFields(Strict):
    """Sampling."""

    temperature: float = Field(1.0, ge=0, description="divides the logits; 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 turns it off")
    top_k: int = Field(0, ge=0, description="0 turns it off")
    min_p: float = Field(0.0, ge=0, lt=1, description="0 turns it off")
    max_prompt_length: int | None = Field(None, ge=1, description="tokens; longer prompts go by `on_overlong`")
    max_completion_length: int = Field(256, ge=1, description="tokens sampled at most")
