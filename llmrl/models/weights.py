"""The policy's weights as rollout engines take them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.models.load import is_adapted
from llmrl.models.quantize import is_quantized, plain_weights

Whole = Callable[[Tensor], Tensor]
"""Gives a parameter in full: where parameters are sharded, all processes call it, in the same order."""


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor.detach()


class ModelWeights:
    """`PolicyWeights` of a model with or without a LoRA adapter of peft. `whole`: for a model that is sharded."""

    def __init__(self, model: Any, whole: Whole = _as_it_is) -> None:
        self._model, self._whole = model, whole
        adapted = is_adapted(model)
        self.merged_because = _beyond_factors(model) if adapted else ""
        """What keeps the adapter from being sent alone; empty when nothing does, and without an adapter."""
        self.adapter_rank = _rank(model) if adapted and not self.merged_because else None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return full_parameters(self._model, whole=self._whole)

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same without what the adapter adds."""
        return full_parameters(self._model, merge=False, whole=self._whole)

    def adapter(self) -> Callable[[Path], None]:
        # peft picks the adapter's own out of these; they are few and small.
        state = {name: self._whole(p) for name, p in self._model.named_parameters() if p.requires_grad}
        # peft would otherwise ask the hub for the base's vocabulary.
        return lambda path: self._model.save_pretrained(path, save_embedding_layers=False, state_dict=state)


_OWN_START = {"gaussian", "orthogonal", "eva"}
"""Values of `init_lora_weights` that leave the base weights alone. The others change them, and engines refuse such adapters."""
_BEYOND_FACTORS = (
    "use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora",
)  # fmt: skip
"""Settings of peft's LoraConfig that make an adapter more than low-rank factors, or its layers others than the model's."""


def _beyond_factors(model: Any) -> str:
    """What an adapter has beside low-rank factors of the decoder's linear layers, which are all that inference engines take; else "".

    vLLM scales by `use_rslora`, `rank_pattern` and `alpha_pattern` as peft does. It takes embeddings and the output head in few models,
    so an adapter on those is merged.
    """
    if len(model.active_adapters) != 1:
        return "several adapters at once"
    config = model.peft_config[model.active_adapters[0]]
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return "another type than LoRA"
    if config.bias != "none":
        return f"bias={config.bias!r}"
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _OWN_START:
        return f"init_lora_weights={config.init_lora_weights!r}"
    for name in _BEYOND_FACTORS:
        if getattr(config, name, None):
            return name
    base = model.get_base_model()
    head = base.get_output_embeddings()
    for path, module in base.named_modules():
        if is_quantized(module):
            return "quantised weights"
        if hasattr(module, "get_delta_weight") and (
            module is head or not isinstance(module.get_base_layer(), nn.Linear)
        ):
            return f"factors of {path}"
    return ""


def _rank(model: Any) -> int:
    config = model.peft_config[model.active_adapters[0]]
    return max([config.r, *config.rank_pattern.values()])


@torch.no_grad()
def full_parameters(model: Any, *, merge: bool = True, whole: Whole = _as_it_is) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, whole tensor) of every parameter, one layer at a time; tied ones once.

    Adapters are merged in, or with `merge` False left out; quantised weights come as what is computed with.
    """
    base = model.get_base_model() if is_adapted(model) else model
    seen: set[int] = set()
    inside: str | None = None  # of a layer that has been given as a whole
    for path, module in base.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = None
        if is_quantized(module) or is_quantized(getattr(module, "base_layer", None)):
            inside = f"{path}."
            yield from ((inside + name, tensor) for name, tensor in plain_weights(module, merge=merge).items())
            continue
        if hasattr(module, "get_delta_weight") or hasattr(module, "modules_to_save"):
            inside = f"{path}."
        plain = _plain(_whole_layer(module, whole), merge) if inside else module
        for name, parameter in plain.named_parameters(recurse=inside is not None):
            if id(parameter) not in seen:
                if inside is None:
                    seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter.detach() if inside else whole(parameter)


def _whole_layer(layer: nn.Module, whole: Whole) -> nn.Module:
    """The layer, or where its parameters are sharded a copy with whole ones."""
    if not any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in layer.parameters()):
        return layer
    return copy.deepcopy(layer, {id(p): nn.Parameter(whole(p), p.requires_grad) for p in layer.parameters()})


def _plain(layer: Any, merge: bool) -> nn.Module:
    """The plain layer that a peft layer stands for."""
    if hasattr(layer, "modules_to_save"):
        return layer.modules_to_save[layer.active_adapters[0]] if merge else layer.original_module
    if not merge:
        return layer.get_base_layer()
    layer = copy.deepcopy(layer)
    layer.merge()
    return layer.get_base_layer()
