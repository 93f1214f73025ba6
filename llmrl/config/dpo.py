"""The DPO recipe: offline from preference pairs, or online, from completions that are sampled and scored on the way."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmrl.config.base import Recipe, as_list
from llmrl.config.benchmark import BenchmarkFields
from llmrl.config.data import DataFields
from llmrl.config.model import ModelFields
from llmrl.config.reference import ReferenceFields, adapter_is_reference
from llmrl.config.reward import RewardFields
from llmrl.config.rollout import RolloutFields, SamplingFields
from llmrl.config.train import TrainFields

LossName = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo", "apo_zero", "apo_down", "sppo", "simpo", "orpo", "bco", "nca", "discopop", "nll"
]  # fmt: skip
REFERENCE_FREE = frozenset({"simpo", "orpo", "nll"})
_SCORE_DIFFERENCE = frozenset({"sigmoid", "hinge", "ipo", "robust", "exo", "discopop", "nll"})


class DPOConfig(
    Recipe,
    ModelFields,
    DataFields,
    ReferenceFields,
    RewardFields,
    RolloutFields,
    SamplingFields,
    BenchmarkFields,
    TrainFields,
):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its relatives; online where `rewards` are given."""

    kind: ClassVar[str] = "dpo"

    learning_rate: float = Field(1e-6, ge=0, description="AdamW's peak rate")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference (orpo: weight of the odds ratio)")
    loss_type: Annotated[list[LossName], BeforeValidator(as_list)] = Field(
        ["sigmoid"], min_length=1, description="a loss, or several that are added: [sigmoid, bco, nll]"
    )
    loss_weights: list[float] | None = Field(None, description="a weight for each loss_type; default: 1 each")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="probability that a label is wrong: of sigmoid, robust and exo"
    )
    simpo_gamma: float = Field(1.0, ge=0, description="simpo: margin between the mean log-probs times beta")
    length_normalized: bool = Field(False, description="log-probs are means over tokens instead of sums")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="weight of tokens beyond the shorter answer's length (LD-DPO); default: 1"
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="divergence from the reference (f-DPO)"
    )
    f_alpha_divergence_coef: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="alpha_divergence: between forward KL (0) and reverse KL (1); the f-DPO paper's 1 - alpha",
    )

    reference_logprobs: Literal["precompute", "on_the_fly"] = Field(
        "precompute",
        description="precompute: one pass before training, kept on disk, no reference in memory after it; with sync_ref_model and "
        "online it is on_the_fly",
    )
    reference_cache: str | None = Field(
        None, description="directory of precomputed log-probs; default: <output_dir>/reference. Runs can share one"
    )
    ref_model_name_or_path: str | None = Field(None, description="another reference than the initial policy")
    sync_ref_model: bool = Field(False, description="move the reference towards the policy while training (TR-DPO)")
    ref_model_mixup_alpha: float = Field(0.6, gt=0, le=1, description="the policy's share in the new reference")
    ref_model_sync_steps: int = Field(512, ge=1, description="steps between such moves")

    max_length: int | None = Field(
        None, ge=2, description="tokens of prompt and answer; default: what the model can take"
    )

    # online
    num_generations: int = Field(
        2, ge=2, description="online: completions a prompt; the best and the worst make a pair"
    )
    max_refills: int = Field(4, ge=0, description="online: extra sampling rounds for groups of equal rewards")

    @property
    def reference_free(self) -> bool:
        """No loss of this recipe looks at a reference."""
        return REFERENCE_FREE.issuperset(self.loss_type)

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"{len(self.loss_weights)} loss_weights for {len(self.loss_type)} loss_types ({', '.join(self.loss_type)}); give one each"
            )
        if "exo" in self.loss_type and self.label_smoothing == 0:
            raise ValueError(
                "exo takes the logarithm of label_smoothing: give a small one, such as 1e-3 (arXiv 2402.00856)"
            )
        if self.label_smoothing and not {"sigmoid", "robust", "exo"} & set(self.loss_type):
            raise ValueError(f"label_smoothing is of sigmoid, robust and exo; {', '.join(self.loss_type)} have none")
        if self.f_divergence_type != "reverse_kl" and (other := set(self.loss_type) - _SCORE_DIFFERENCE):
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type} changes the difference of two scores, which {', '.join(sorted(other))} does "
                "not use; leave it at reverse_kl"
            )
        if self.length_normalized and self.ld_alpha is not None:
            raise ValueError("length_normalized and ld_alpha both correct for length; use one")
        if self.ld_alpha is not None and (means := REFERENCE_FREE.intersection(self.loss_type)):
            raise ValueError(
                f"ld_alpha weighs tokens of sums of log-probs, but {', '.join(sorted(means))} take means over tokens; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.sync_ref_model and self.lora is not None:
            raise ValueError(
                "sync_ref_model moves a copy of all weights, but with lora the reference is the model without its adapter; "
                "train in full, or leave sync_ref_model out"
            )
        if self.reference_free and (self.sync_ref_model or self.ref_model_name_or_path):
            raise ValueError(
                f"{', '.join(self.loss_type)} has no reference: leave sync_ref_model and ref_model_name_or_path out"
            )
        if (
            self.sync_ref_model
            and "reference_logprobs" in self.model_fields_set
            and self.reference_logprobs == "precompute"
        ):
            raise ValueError("sync_ref_model changes the reference while training: use reference_logprobs: on_the_fly")
        self.check_offload(self._no_reference_in_memory())
        return self

    def _no_reference_in_memory(self) -> str:
        if self.reference_free:
            return f"{', '.join(self.loss_type)} has no reference"
        if self.reference_logprobs == "precompute" and not (self.sync_ref_model or self.rewards):
            return "reference_logprobs: precompute keeps no reference while training"
        return "" if self.ref_model_name_or_path else adapter_is_reference(self.lora)

    @model_validator(mode="after")
    def _check_online(self) -> Self:
        self.check_for_training("gives a prompt equal completions, so no pair")
        return self
