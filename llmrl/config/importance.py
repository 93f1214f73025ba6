"""Correction for rollouts that another policy than the one in training sampled."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmrl.config.base import Strict
from llmrl.config.rollout import RolloutSettings


class ImportanceFields(Strict):
    """Importance correction."""

    rollout: RolloutSettings
    importance_correction: Literal["none", "token_truncate"] | None = Field(
        None,
        description="token_truncate: weight by min(old / sampled, importance_cap) a token, for engines whose log-probs differ from the "
        "trainer's and for stale rollouts; default: token_truncate with a vLLM engine, none with the local one",
    )
    importance_cap: float = Field(2.0, gt=0, description="cap of importance_correction")

    @model_validator(mode="after")
    def _choose_correction(self) -> Self:
        if self.importance_correction is None:
            # Only a vLLM engine can be off policy: max_staleness > 0 is for vllm_server alone.
            chosen = "none" if self.rollout.engine == "local" else "token_truncate"
            self.__dict__["importance_correction"] = chosen  # the model is frozen once it is made
        return self

    @property
    def uncorrected(self) -> bool:
        """Stale rollouts are trained on as if the policy of now had sampled them: allowed, to be compared with; biased."""
        return self.rollout.max_staleness > 0 and self.importance_correction == "none"
