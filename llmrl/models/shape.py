"""The sizes of a model, from its configuration alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ModelShape:
    """Counts of parameters (`embedding`: those of the input table; `trainable`: with LoRA the adapters') and widths.

    `query_width` and `kv_width` are heads x head size; `positions` is the longest sequence, None where there is no bound.
    """

    parameters: int
    trainable: int
    embedding: int
    layers: int
    hidden: int
    intermediate: int
    query_width: int
    kv_width: int
    vocab: int
    positions: int | None


def shape_of(model: nn.Module) -> ModelShape:
    """The shape of a Hugging Face causal LM, on any device (also "meta"), with or without adapters."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    seen = {id(p): p for p in model.parameters()}.values()  # tied weights once
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    return ModelShape(
        parameters=sum(p.numel() for p in seen),
        trainable=sum(p.numel() for p in seen if p.requires_grad),
        embedding=embedding.numel(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        query_width=heads * head_dim,
        kv_width=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        vocab=embedding.shape[0],
        positions=getattr(config, "max_position_embeddings", None),
    )


def on_meta(build: Any) -> nn.Module:
    """Calls `build` with parameters on the meta device: shapes without memory."""
    with torch.device("meta"):
        return build()
