"""The PPO recipe. A preset names a value for each axis; any axis can be overridden by its own key."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.base import Recipe
from llmrl.config.benchmark import BenchmarkFields
from llmrl.config.data import DataFields
from llmrl.config.importance import ImportanceFields
from llmrl.config.model import ModelFields
from llmrl.config.presets import PPO_PRESETS
from llmrl.config.reference import ReferenceFields, adapter_is_reference
from llmrl.config.reward import RewardFields
from llmrl.config.rollout import RolloutFields, SamplingFields
from llmrl.config.train import TrainFields

_PPO = PPO_PRESETS["ppo"]


class PPOConfig(
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
    """Proximal policy optimisation with a critic (Schulman et al. 2017, arXiv 1707.06347; for language models, arXiv 2203.02155)."""

    kind: ClassVar[str] = "ppo"

    preset: Literal["ppo", "orz_ppo", "trpo_penalty"] = Field(
        "ppo", description="a named method: a value for each axis below"
    )
    learning_rate: float = Field(1e-6, ge=0, description="AdamW's peak rate")
    num_generations: int = Field(1, ge=1, description="completions a prompt")

    # the critic
    critic: Literal["shared", "separate"] = Field(
        "shared", description="shared: a value head on the policy's trunk; separate: a model of its own"
    )
    critic_model_name_or_path: str | None = Field(
        None,
        description="separate: what the critic starts from, a reward model for instance; default: the policy's model",
    )
    critic_learning_rate: float | None = Field(
        None, ge=0, description="peak rate of the value head or the critic; default: learning_rate"
    )
    critic_warmup_steps: int = Field(
        0, ge=0, description="first steps, in which only the value head or the critic learns"
    )
    vf_coef: float = Field(0.1, gt=0, description="weight of the value loss")

    # the axes: a preset sets them, a key of the recipe overrides the preset
    num_iterations: int = Field(
        _PPO["num_iterations"], ge=1, description="passes over the rollouts of one step (PPO epochs)"
    )
    gamma: float = Field(_PPO["gamma"], ge=0, le=1, description="discount a token")
    lam: float = Field(_PPO["lam"], ge=0, le=1, description="lambda of generalised advantage estimation")
    whiten_advantages: bool = Field(_PPO["whiten_advantages"], description="advantages of a step get mean 0 and std 1")
    cliprange_value: float | None = Field(
        _PPO["cliprange_value"], gt=0, description="a value moves at most so far from the old one; default: no bound"
    )
    surrogate: Literal["ppo_clip", "is_pg"] = Field(
        _PPO["surrogate"], description="ppo_clip, or the importance-weighted policy gradient without a clip"
    )
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"] = Field(
        _PPO["aggregation"], description="how token losses become one; constant divides by max_completion_length"
    )
    epsilon: float = Field(_PPO["epsilon"], gt=0, description="clip: the ratio's lower bound is 1 - epsilon")
    epsilon_high: float | None = Field(None, gt=0, description="upper bound 1 + epsilon_high; default: epsilon")
    dual_clip: float | None = Field(
        None, gt=1, description="c of dual-clip PPO: bounds the loss at negative advantages"
    )
    beta: float = Field(_PPO["beta"], ge=0, description="weight of the KL, at the start where a controller moves it")
    kl_to: Literal["reference", "old"] = Field(
        _PPO["kl_to"], description="KL to the initial model, or to the policy that sampled"
    )
    kl_place: Literal["reward", "loss"] = Field(
        _PPO["kl_place"], description="taken off each token's reward, or added to the loss"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        _PPO["kl_estimator"],
        description="Schulman's estimators of the KL; in the reward k1, in the loss k2 or k3 (to the old policy k1, too)",
    )
    kl_controller: Literal["fixed", "adaptive", "lagrange"] = Field(
        _PPO["kl_controller"],
        description="adaptive: beta is halved below kl_target / 1.5 and doubled above kl_target x 1.5; "
        "lagrange: beta += kl_controller_step (KL - kl_target), at least 0",
    )
    kl_target: float | None = Field(
        _PPO["kl_target"], gt=0, description="KL a token, in nats, that a controller aims at"
    )
    kl_controller_step: float = Field(10.0, gt=0, description="step size of lagrange")
    truncated_completions: Literal["keep", "mask", "zero_reward"] = Field(
        _PPO["truncated_completions"],
        description="completions that the token limit cut: keep, out of the loss, reward 0",
    )
    missing_eos_penalty: float | None = Field(
        None, gt=0, description="taken off the reward of completions that were cut"
    )
    target_kl: float | None = Field(
        None, gt=0, description="a step's further updates are skipped when mean(old - new log-prob) exceeds this"
    )
    entropy_coef: float = Field(0.0, description="weight of the entropy bonus")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, dict):
            name = data.get("preset", "ppo")
            if isinstance(name, str) and name in PPO_PRESETS:
                return {**PPO_PRESETS[name], **data}
        return data

    @property
    def needs_reference(self) -> bool:
        """The KL is to the initial model and can be other than 0."""
        return self.kl_to == "reference" and (self.beta > 0 or self.kl_controller == "lagrange")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_for_training("explores nothing: a critic can't tell one completion from another")
        if self.surrogate != "ppo_clip" and self.dual_clip:
            raise ValueError(f"dual_clip bounds the ratio of ppo_clip; surrogate {self.surrogate} has no clip")
        if self.critic_model_name_or_path and self.critic == "shared":
            raise ValueError(
                "critic_model_name_or_path names a model for `critic: separate`; the shared critic has none of its own"
            )
        return self

    @model_validator(mode="after")
    def _check_kl(self) -> Self:
        if self.kl_place == "loss" and self.kl_estimator == "k1" and self.kl_to == "reference":
            raise ValueError(
                "k1 in the loss has a gradient of mean zero: it pulls nowhere. Use k2 or k3, or kl_place: reward"
            )
        if self.kl_to == "old" and self.kl_place == "reward":
            raise ValueError("the KL to the old policy is 0 when rewards are made; use kl_place: loss")
        if self.kl_place == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"kl_estimator {self.kl_estimator} in the reward is biased: the expectation of k1 is the KL; use k1, or kl_place: loss"
            )
        if self.kl_controller == "fixed" and self.kl_target not in (None, PPO_PRESETS[self.preset]["kl_target"]):
            raise ValueError(
                f"kl_target {self.kl_target} is what a kl_controller steers beta to, and kl_controller is fixed: use adaptive or lagrange; "
                "what ends a step's updates early is target_kl"
            )
        if self.kl_controller != "fixed" and self.kl_target is None:
            raise ValueError(f"kl_controller {self.kl_controller} needs a kl_target, in nats a token, such as 0.05")
        if self.kl_controller == "adaptive" and self.beta == 0:
            raise ValueError("an adaptive beta is halved and doubled: from 0 it never moves; give a beta above 0")
        none = "the KL is not to the initial model, or its weight is 0"
        self.check_offload(adapter_is_reference(self.lora) if self.needs_reference else none)
        return self
