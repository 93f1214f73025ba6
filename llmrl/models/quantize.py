"""Frozen weights in 4 or 8 bits under an adapter (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

All linear layers of the decoder are quantised as they are loaded; embeddings, norms and the output layer are not. Beside an adapter
nothing else has to be prepared: peft freezes the rest and keeps adapters in float32, and checkpointing here needs no input with a gradient.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from llmrl.config.model import ModelFields
from llmrl.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def quantization_config(fields: ModelFields, adapted: bool) -> BitsAndBytesConfig | None:
    """What transformers' from_pretrained takes; None where nothing is quantised. `adapted`: there is or will be an adapter.

    nf4: normal-float 4 with quantised constants, 0.516 bytes a weight. int8: a byte a weight, and a scale a row (see int8.py). Both compute in
    the recipe's precision. Raises ConfigError without an adapter, for quantised weights can't learn, and where bitsandbytes is absent.
    """
    if fields.quantization is None:
        return None
    if not adapted:
        raise ConfigError(
            f"quantization: {fields.quantization} freezes the weights, and there is no adapter that could learn: add `lora: {{r: 16}}`, or leave "
            "quantization out to train in full"
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization: {fields.quantization} needs bitsandbytes, which is not installed: `pip install bitsandbytes`, or leave it out"
        )
    if fields.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_AUTOCAST.get(fields.mixed_precision, DTYPES[fields.dtype]),
    )


def settle(model: nn.Module, fields: ModelFields) -> nn.Module:
    """A quantised model that was just loaded, ready to compute."""
    if fields.quantization == "int8":
        from llmrl.models.int8 import widen_for_products

        widen_for_products(model)
    return model


def is_quantized(module: Any) -> bool:
    """Whether this is a linear layer of bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params") and isinstance(
        module, nn.Linear
    )


@torch.no_grad()
def plain_weights(layer: Any, *, merge: bool) -> dict[str, Tensor]:
    """`weight` [out, in] and, where there is one, `bias` of the linear layer that a quantised one computes with; with `merge` its adapters in it.

    layer: of bitsandbytes, or peft's around one. The weight is never rounded to 4 or 8 bits again. Raises ConfigError for an adapter with
    a bias.
    """
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = _dequantised(base)
    for name in layer.active_adapters if merge and base is not layer else ():
        if layer.lora_bias.get(name):
            raise ConfigError(f"adapter {name} has biases (lora_bias), which can't be merged into quantised weights")
        if name in layer.lora_variant:  # DoRA
            weight = layer.lora_variant[name].merge_safe(layer, name, weight)
            layer._cache_pop(f"{name}-weight_norm")  # kept for an unmerge
        else:
            weight = (weight + layer.get_delta_weight(name)).to(weight.dtype)
    return {"weight": weight} | ({} if base.bias is None else {"bias": base.bias.detach()})


def _dequantised(layer: Any) -> Tensor:
    if hasattr(layer, "state"):
        from llmrl.models.int8 import dequantised

        return dequantised(layer.state.CB, layer.state.SCB, torch.float32)
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight
