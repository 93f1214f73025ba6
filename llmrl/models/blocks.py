"""The decoder layers of a model: the units in which a backend shards it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from llmrl.errors import ConfigError


def decoder_layers(module: nn.Module, class_names: Sequence[str] = ()) -> list[nn.Module]:
    """The layers of each trunk in `module`, found by their structure: a ModuleList of the length that the configuration names.

    class_names: those of the layers instead, as a launch file may give them. Raises ConfigError where none is found.
    """
    if class_names:
        found = [m for m in module.modules() if type(m).__name__ in class_names]
        if not found:
            raise ConfigError(
                f"the launch file names {', '.join(class_names)} as layers to wrap, and the model has none. Leave the names out "
                "(fsdp_transformer_layer_cls_to_wrap): llmrl finds the decoder layers itself"
            )
        return found
    layers: list[nn.Module] = []
    for counts, trunk in _trunks(module):
        for child in trunk.modules():
            if isinstance(child, nn.ModuleList) and len(child) == counts:
                layers += list(child)
                break
    if not layers:
        raise ConfigError(
            "no list of decoder layers was found in the model, so it can't be sharded layer by layer. Name their class in the "
            "launch file: fsdp_transformer_layer_cls_to_wrap"
        )
    return layers


def _trunks(module: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """(number of layers, model) of each outermost Hugging Face model in `module`: a policy, a critic beside it."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if text is not None and hasattr(text, "num_hidden_layers"):
        yield text.num_hidden_layers, module
        return
    for child in module.children():
        yield from _trunks(child)
