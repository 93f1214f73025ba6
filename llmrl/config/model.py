"""Which model, in which form."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmrl.config.base import Strict


class LoraSettings(Strict):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). Names are peft's `LoraConfig`."""

    r: int = Field(16, ge=1, description="rank")
    lora_alpha: float = Field(32, gt=0, description="the update is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapter")
    target_modules: str | list[str] = Field("all-linear", description="layers that get an adapter")
    modules_to_save: list[str] | None = Field(None, description="layers trained in full beside the adapters")
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r)")
    use_dora: bool = Field(False, description="weight-decomposed adapters")


class ModelFields(Strict):
    """Model."""

    model_name_or_path: str = Field(description="a hub id, or a directory in Hugging Face's format")
    model_revision: str = Field("main", description="hub branch, tag or commit")
    tokenizer_name_or_path: str | None = Field(None, description="default: the model's own")
    chat_template: str | None = Field(
        None, description="a Jinja template, or the path of a file with one; default: the tokenizer's"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the parameters and of the optimizer state"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="autocast type of forward and backward")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward: less memory, about a third more time"
    )
    activation_offloading: bool = Field(
        False, description="keep what the backward needs in host memory: less of a GPU's, and copies to and fro"
    )
    lora: LoraSettings | None = Field(None, description="low-rank adapters instead of full training: `lora: {r: 16}`")
    quantization: Literal["nf4", "int8"] | None = Field(
        None, description="frozen weights in 4 or 8 bits under an adapter (QLoRA); needs lora and bitsandbytes"
    )
