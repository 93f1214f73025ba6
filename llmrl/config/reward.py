"""Which rewards, with what weight, under what limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmrl.config.base import Strict, as_list
from llmrl.config.rubric import JudgeSettings


class WeightSchedule(Strict):
    """A weight that changes over the run: from `start` to `end` over the first `steps` steps, and `end` from there on."""

    start: float = Field(allow_inf_nan=False, description="weight at step 0")
    end: float = Field(allow_inf_nan=False, description="weight from step `steps` on")
    steps: int = Field(ge=1, description="trainer_state.global_step at which `end` is reached")
    kind: Literal["linear", "cosine", "step"] = Field(
        "linear", description="the way between: a line, half a cosine, or `start` until `end`"
    )

    def at(self, step: int) -> float:
        """The weight at a step. Example: WeightSchedule(start=1, end=0, steps=100, kind="cosine").at(50) -> 0.5"""
        if step >= self.steps:
            return self.end
        share = max(0, step) / self.steps
        share = {"linear": share, "cosine": (1 - math.cos(math.pi * share)) / 2, "step": 0.0}[self.kind]
        return self.start + (self.end - self.start) * share


def _weight(value: Any) -> Any:
    """A union's errors would name both of its members for one mistake."""
    if isinstance(value, Mapping):
        return WeightSchedule.model_validate(value)
    if isinstance(value, WeightSchedule) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(
        f"given {value!r}; allowed: a number, or a schedule {{start, end, steps, kind: linear|cosine|step}}"
    )


Weight = Annotated[float | WeightSchedule, BeforeValidator(_weight)]


class RewardSpec(Strict):
    """One reward: a function (a built-in name, `module:function` or `path/file.py:function`), or a reward `model`. A bare string is
    its `function`.

    `args` are passed to it as keyword arguments. `timeout` is in seconds of work: for a row-wise verifier the deadline of one row,
    for a batch function the deadline of one call. `isolate: process` runs it in a worker that can be killed.
    """

    shorthand: ClassVar[str] = "function"

    function: str = Field("", description="a built-in name, `module:function` or `path/file.py:function`")
    model: Annotated[list[str], BeforeValidator(as_list)] = Field(
        [], description="instead of a function: a reward model's directory or hub id, or several, an ensemble"
    )
    ensemble: Literal["mean", "min", "mean_minus_std"] = Field(
        "mean", description="of several models: the mean score, the least, or mean - ensemble_std_weight x std"
    )
    ensemble_std_weight: float = Field(1.0, ge=0, description="factor of the std in mean_minus_std")
    tokens_per_batch: int = Field(16384, ge=1, description="of a model: tokens of one forward")
    max_length: int | None = Field(
        None,
        ge=1,
        description="of a model: longer conversations lose their beginning; default: what the model can take",
    )
    rubric: str = Field(
        "", description="what a `judge` grades by: a YAML file, or the name of a rubric that comes with llmrl"
    )
    rubric_column: str | None = Field(None, description="column with a rubric a row; `rubric` is for rows without")
    judge: JudgeSettings | None = Field(
        None, description="who grades by the rubric; with a `function`: who is asked where the function says no"
    )
    name: str | None = Field(None, description="name in metrics; default: the function's own")
    args: dict[str, Any] = Field({}, description="keyword arguments")
    weight: Weight = Field(
        1.0,
        description="factor in the combined reward: a number, or a schedule {start, end, steps, kind: linear|cosine|step}",
    )
    timeout: float | None = Field(None, gt=0, description="seconds; default 10 a row, 60 a batch call")
    isolate: Literal["process", "inline"] | None = Field(
        None, description="default: process; inline for the built-ins that can't hang"
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        description="address space of a worker beyond what loading took; default 4 for a row verifier, none for a batch function",
    )

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        judged = self.judge is not None
        if not judged and (self.rubric or self.rubric_column):
            raise ValueError("a rubric needs a `judge` (a model, and the base_url of its server) that grades by it")
        if bool(self.function) + bool(self.model) + (judged and not self.function) != 1:
            raise ValueError(
                "give a `function` (a name or path), a `model` (a reward model) or a `judge` with a `rubric`, one of the three; only a "
                "function may have a judge beside it, which is asked where the function says no"
            )
        if judged and not (self.function or self.rubric or self.rubric_column):
            raise ValueError("a judge needs a `rubric` (a YAML file) or a `rubric_column` to grade by")
        if judged and not self.function and (self.args or self.isolate or self.memory_gb or self.timeout):
            raise ValueError(
                "args, isolate, memory_gb and timeout are of functions; a judge has its own, `judge.deadline`"
            )
        if judged and self.function and self.judge is not None and self.judge.mode == "pairwise":
            raise ValueError("a judge beside a function scores single answers: leave out `mode: pairwise`")
        if self.model and (self.args or self.isolate or self.memory_gb or self.timeout):
            raise ValueError(
                "args, isolate, memory_gb and timeout are of functions: a model runs in the training process, without them"
            )
        return self


Rewards = Annotated[list[RewardSpec], BeforeValidator(as_list)]


class RewardFields(Strict):
    """Rewards."""

    # What `stop` means: the run ends at the first row on which a function raised or answered malformed, and at a failed batch call.
    # A row verifier that ran out of time or memory did so because of what the model wrote, and one hostile answer must not end a
    # run: that row gets None, counted and logged; the run stops when more than half of the rows of a call, and more than 3, end so.
    rewards: Rewards = Field([], description="reward functions: a name, or a list of specs (`rewards.0.weight=0.5`)")
    combine: Literal["sum", "product", "gated", "normalize_then_sum"] = Field(
        "sum",
        description="of weight x value: their sum, their product, the sum only where the first reward passes (else its own term), or "
        "the sum after each was standardised within its group",
    )
    gate_threshold: float = Field(
        0.5, allow_inf_nan=False, description="of `gated`: the first reward passes from here on"
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="a reward function failed: stop, or None for the row (a verifier's timeout on a few rows never stops)",
    )
    allow_code_execution: bool = Field(
        False, description="let reward functions run programs that the model wrote, in a sandbox (docs/code.md)"
    )
    reward_workers: int = Field(2, ge=1, description="worker processes of each training process")

    @model_validator(mode="after")
    def _check_gate(self) -> Self:
        if self.gate_threshold != 0.5 and self.combine != "gated":
            raise ValueError(f"gate_threshold is of `combine: gated`; combine is {self.combine}")
        return self
