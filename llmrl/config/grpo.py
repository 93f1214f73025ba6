"""The GRPO recipe. A preset names a value for each axis; any axis can be overridden by its own key."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.base import Recipe
from llmrl.config.benchmark import BenchmarkFields
from llmrl.config.data import DataFields
from llmrl.config.importance import ImportanceFields
from llmrl.config.model import ModelFields
from llmrl.config.presets import GRPO_PRESETS
from llmrl.config.reference import ReferenceFields, adapter_is_reference
from llmrl.config.reward import RewardFields
from llmrl.config.rollout import RolloutFields, SamplingFields
from llmrl.config.train import TrainFields

_GRPO = GRPO_PRESETS["grpo"]


class GRPOConfig(
    Recipe,
    ModelFields,
    DataFields,
    ReferenceFields,
    RewardFields,
    RolloutFields,
    ImportanceFields,
    SamplingFields,
    BenchmarkFields,
    TrainFields,
):
    """KL-regularised group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) and its critic-free relatives."""

    kind: ClassVar[str] = "grpo"

    preset: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce", "reinforce_pp"] = Field(
        "grpo", description="a named method: a value for each axis below"
    )
    learning_rate: float = Field(1e-6, ge=0, description="AdamW's peak rate")
    num_generations: int = Field(8, ge=1, description="completions a prompt")
    num_iterations: int = Field(1, ge=1, description="passes over the rollouts of one step")

    # the axes: a preset sets them, a key of the recipe overrides the preset
    baseline: Literal["group_mean", "leave_one_out", "running_mean", "none"] = Field(
        _GRPO["baseline"],
        description="what is taken off a reward: its group's mean, the mean of the others, a running mean of all, or nothing",
    )
    baseline_momentum: float = Field(
        0.9, ge=0, lt=1, description="of running_mean: the old mean's share in the new one"
    )
    scale_rewards: Literal["group", "batch", "whiten", "none"] = Field(
        _GRPO["scale_rewards"],
        description="advantages are divided by the std of rewards in their group, in the batch, or by their own std after being "
        "centred (whiten), or not",
    )
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"] = Field(
        _GRPO["aggregation"], description="how token losses become one; constant divides by max_completion_length"
    )
    surrogate: Literal["ppo_clip", "is_pg", "pg"] = Field(
        _GRPO["surrogate"], description="clipped ratio, ratio without a clip, or the plain policy gradient"
    )
    beta: float = Field(_GRPO["beta"], ge=0, description="weight of the KL to the reference; 0 loads no reference")
    kl_place: Literal["loss", "reward"] = Field(
        _GRPO["kl_place"], description="added to the loss, or its sum over the completion taken off the reward"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        _GRPO["kl_estimator"], description="Schulman's estimators of the KL"
    )
    epsilon: float = Field(_GRPO["epsilon"], gt=0, description="clip: the ratio's lower bound is 1 - epsilon")
    epsilon_high: float | None = Field(
        _GRPO["epsilon_high"], gt=0, description="upper bound 1 + epsilon_high; default: epsilon"
    )
    delta: float | None = Field(
        _GRPO["delta"], gt=1, description="upper bound of the ratio, both signs of the advantage (two-sided clip)"
    )
    dual_clip: float | None = Field(
        _GRPO["dual_clip"], gt=1, description="c of dual-clip PPO: bounds the loss at negative advantages"
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        _GRPO["importance_sampling_level"], description="ratio of each token, or of the sequence (GSPO)"
    )
    group_filter: Literal["none", "drop_zero_std"] = Field(
        _GRPO["group_filter"], description="drop_zero_std: groups of equal rewards are replaced by new prompts"
    )
    truncated_completions: Literal["keep", "mask", "zero_reward"] = Field(
        _GRPO["truncated_completions"],
        description="completions that the token limit cut: keep, out of the loss, reward 0",
    )

    entropy_coef: float = Field(0.0, description="weight of the entropy bonus")
    top_entropy_quantile: float = Field(
        1.0, gt=0, le=1, description="share of tokens, the most uncertain, that get a policy gradient; the KL is on all"
    )
    use_bias_correction_kl: bool = Field(False, description="multiply the KL term by the ratio (TRL's default)")
    max_refills: int = Field(4, ge=0, description="extra sampling rounds when group_filter dropped groups")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, dict):
            name = data.get("preset", "grpo")
            if isinstance(name, str) and name in GRPO_PRESETS:
                return {**GRPO_PRESETS[name], **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_for_training("gives every group equal completions, so no advantage")
        if self.num_generations < 2 and self.baseline in ("group_mean", "leave_one_out"):
            raise ValueError(
                f"num_generations {self.num_generations} makes no group: a completion's baseline is the mean of its group, "
                "so every advantage would be 0; use at least 2"
            )
        if self.surrogate == "pg" and self.num_iterations * self.updates_per_step > 1:
            raise ValueError(
                f"{self.num_iterations * self.updates_per_step} updates a step leave the policy that sampled, and pg has no ratio to "
                "correct for it: use surrogate is_pg or ppo_clip, or one update"
            )
        if self.surrogate != "ppo_clip" and (self.delta or self.dual_clip):
            raise ValueError(f"delta and dual_clip bound the ratio of ppo_clip; surrogate {self.surrogate} has no clip")
        if self.kl_place == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"kl_estimator {self.kl_estimator} in the reward is biased: the expectation of k1 is the KL; use k1, or kl_place: loss"
            )
        if self.kl_place == "reward" and self.use_bias_correction_kl:
            raise ValueError("use_bias_correction_kl is for a KL in the loss; kl_place is reward")
        self.check_offload("beta is 0 and loads no reference" if self.beta == 0 else adapter_is_reference(self.lora))
        return self
