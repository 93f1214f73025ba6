"""The sizes of a model, from its configuration alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelShape:
    """Counts of parameters (`embedding`: those of the input table; `trainable`: with LoRA the adapters') and widths.

    `query_width` and `kv_width` are heads x head size, `norm_width` is that of all norms of one layer together; `heads` are those of
    the queries, `layer_parameters` all of one layer (with adapters), `head` those of the output matrix, 0 for a scorer. `positions` is the
    longest sequence, None where there is no bound.
    """

    parameters: int
    trainable: int
    embedding: int
    head: int
    layers: int
    layer_parameters: int
    hidden: int
    intermediate: int
    query_width: int
    kv_width: int
    heads: int
    norm_width: int
    vocab: int
    positions: int | None

    @property
    def attention_share(self) -> float:
        """What one pair of tokens costs in attention, in units of one token's products with the weights: a sequence of T tokens takes
        2 M T + 2 L q T^2 FLOPs forward, M being the weights that a token is multiplied with (docs/scale.md)."""
        return self.layers * self.query_width / (self.layers * self.layer_parameters + self.head)


def shape_of(model: nn.Module) -> ModelShape:
    """The shape of a Hugging Face causal LM or sequence classifier, on any device (also "meta"), with or without adapters."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_attention_heads", 0)  # none in a model without attention, as Mamba
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    query, kv = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    seen = {id(p): p for p in model.parameters()}.values()  # tied weights once
    layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)[0]
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return ModelShape(
        parameters=sum(p.numel() for p in seen),
        trainable=sum(p.numel() for p in seen if p.requires_grad),
        embedding=embedding.numel(),
        head=0 if head is None else head.weight.numel(),
        layers=config.num_hidden_layers,
        layer_parameters=sum(p.numel() for p in layer.parameters()),
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        query_width=query,
        kv_width=kv,
        heads=heads,
        norm_width=_norm_width(layer, config, query, kv),
        vocab=embedding.shape[0],
        positions=getattr(config, "max_position_embeddings", None),
    )


def _norm_width(layer: nn.Module, config: Any, query: int, kv: int) -> int:
    names = [name for name, m in layer.named_modules() if "norm" in type(m).__name__.lower()]
    special = {"q_norm": query, "k_norm": kv}
    return sum(special.get(name.rpartition(".")[2], config.hidden_size) for name in names)
