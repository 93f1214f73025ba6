"""The SFT recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from llmrl.config.base import Recipe
from llmrl.config.benchmark import BenchmarkFields
from llmrl.config.data import DataFields
from llmrl.config.model import ModelFields
from llmrl.config.train import TrainFields


class SFTConfig(Recipe, ModelFields, DataFields, BenchmarkFields, TrainFields):
    """Supervised fine-tuning: negative log-likelihood of the supervised tokens, averaged over all of them in an update."""

    kind: ClassVar[str] = "sft"

    learning_rate: float = Field(2e-5, ge=0, description="AdamW's peak rate")
    max_length: int | None = Field(None, ge=2, description="tokens; default: what the model can take")
    train_on: Literal["completion", "all"] = Field(
        "completion", description="completion: the answer, or the assistant's turns; all: every token"
    )
    allow_code_execution: bool = Field(
        False,
        description="let the scorers of benchmarks run programs that the model wrote, in a sandbox (docs/code.md)",
    )
    loss_type: Literal["nll", "dft"] = Field(
        "nll", description="nll; dft weighs each token by its own probability (arXiv 2508.05629)"
    )
