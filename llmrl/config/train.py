"""Batches, optimizer, schedule, checkpoints and logs of a training run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmrl.config.base import Strict, as_list

Trackers = Annotated[list[Literal["tensorboard", "wandb", "trackio"]], BeforeValidator(as_list)]


class TrainFields(Strict):
    """Training."""

    output_dir: str = Field(description="the run directory: config, metrics, samples, checkpoints, final model")
    seed: int = Field(0, description="of everything random")

    batch_size: int = Field(16, ge=1, description="rows, pairs or prompts of one step, over all processes")
    updates_per_step: int = Field(1, ge=1, description="optimizer steps that share the batch of one step")
    tokens_per_microbatch: int = Field(8192, ge=1, description="tokens of one forward and backward on one process")
    max_steps: int | None = Field(None, ge=1, description="steps; default: num_train_epochs passes over the data")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data")

    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit keeps its moments in 8 bits, by bitsandbytes; not where parameters are sharded"
    )
    learning_rate: float = Field(1e-5, ge=0, description="AdamW's peak rate")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("cosine", description="after the warm-up")
    warmup_steps: int | None = Field(None, ge=0, description="updates of linear warm-up; default: from warmup_ratio")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of all updates, if warmup_steps is not given")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="final rate as a share of learning_rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; not on biases and norms")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    max_nonfinite_steps: int = Field(3, ge=0, description="updates in a row with a non-finite gradient before stopping")

    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints; default: only at the end")
    save_total_limit: int | None = Field(2, ge=1, description="checkpoints that are kept; null keeps all")
    resume: str = Field("auto", description="auto (continue the run in output_dir), never, or a checkpoint directory")
    sigterm_exit_code: int = Field(
        143, ge=0, le=255, description="exit code after SIGTERM and the checkpoint that it causes"
    )
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; default: only at the end")
    metric_for_best_model: str | None = Field(
        None,
        description="a number of the evaluations, such as eval_accuracy: the checkpoint where it is best is kept too",
    )
    greater_is_better: bool | None = Field(None, description="default: true, unless the metric's name ends in loss")

    report_to: Trackers = Field([], description="trackers beside the run directory's own files")
    run_name: str | None = Field(None, description="name in trackers; default: the run directory's")
    num_samples_logged: int = Field(4, ge=0, description="rows of the sample table on the screen")
    collective_timeout: float = Field(
        3600.0,
        gt=0,
        description="seconds that a process waits for one that is alive but does not come; one that died is noticed at once",
    )
    num_processes: int | None = Field(
        None, ge=1, description="processes this run must have; it refuses to start with another number"
    )

    @model_validator(mode="after")
    def _check_best(self) -> Self:
        if self.greater_is_better is not None and self.metric_for_best_model is None:
            raise ValueError("greater_is_better says how metric_for_best_model is read, and that is not given")
        if self.metric_for_best_model is not None and not self.metric_for_best_model.startswith("eval_"):
            raise ValueError(
                f"metric_for_best_model {self.metric_for_best_model!r}: give a number of the evaluations, whose names begin with eval_, such "
                f"as eval_{self.metric_for_best_model}; a number of the training batches says more about the batch than about the model"
            )
        return self

    @model_validator(mode="after")
    def _check_updates(self) -> Self:
        if self.updates_per_step > self.batch_size:
            raise ValueError(
                f"updates_per_step {self.updates_per_step} can't share a batch_size of {self.batch_size}: each update needs a row or prompt"
            )
        return self
