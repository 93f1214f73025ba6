"""The policy's weights as rollout engines take them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.models.load import is_adapted


class ModelWeights:
    """`PolicyWeights` of a model that this process holds whole, with or without a LoRA adapter of peft."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.adapter_rank = _plain_lora_rank(model)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return full_parameters(self._model)

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same without what the adapter adds."""
        return full_parameters(self._model, merge=False)

    def save_adapter(self, directory: Path) -> None:
        self._model.save_pretrained(directory)


def _plain_lora_rank(model: Any) -> int | None:
    """The rank of an adapter that low-rank factors of linear layers say all of, as inference engines take it; else None."""
    if not is_adapted(model):
        return None
    config = model.peft_config[model.active_adapter]
    whole = config.modules_to_save or getattr(config, "trainable_token_indices", None) or config.bias != "none"
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA" or config.use_dora or whole:
        return None
    return max([config.r, *config.rank_pattern.values()])


@torch.no_grad()
def full_parameters(model: Any, *, merge: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, whole tensor) of every parameter, one layer at a time; tied ones once.

    Adapters are merged in, or with `merge` False left out.
    """
    base = model.get_base_model() if is_adapted(model) else model
    seen: set[int] = set()
    inside: str | None = None  # of a layer that has been given as a whole
    for path, module in base.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = None
        if hasattr(module, "get_delta_weight") or hasattr(module, "modules_to_save"):
            inside = f"{path}."
        plain = _plain(module, merge) if inside else module
        for name, parameter in plain.named_parameters(recurse=inside is not None):
            if id(parameter) not in seen:
                if inside is None:
                    seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter.detach()


def _plain(layer: Any, merge: bool) -> nn.Module:
    """The plain layer that a peft layer stands for."""
    if hasattr(layer, "modules_to_save"):
        return layer.modules_to_save[layer.active_adapters[0]] if merge else layer.original_module
    if not merge:
        return layer.get_base_layer()
    layer = copy.deepcopy(layer)
    layer.merge()
    return layer.get_base_layer()
