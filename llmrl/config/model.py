"""Which model, in which form."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmrl.config.base import Strict


class LoraSettings(Strict):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). Names are peft's `LoraConfig`."""

    r: int = Field(16, ge=1)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False


class ModelFields(Strict):
    """The model part of a training recipe, flat at its top level."""

    model_name_or_path: str
    model_revision: str = "main"
    tokenizer_name_or_path: str | None = None
    chat_template: str | None = Field(None, description="a Jinja template, or the path of a file with one")
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the parameters and of the optimizer state"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = None
