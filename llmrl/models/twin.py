"""A plain copy of a sharded policy to sample from: decoding goes through the layers thousands of times, and gathers them once."""

from __future__ import annotations

import copy

import torch
from torch import nn

from llmrl.models.blocks import decoder_layers
from llmrl.models.forward import PolicyModule
from llmrl.types import PolicyWeights


class Twin:
    """`module` is a PolicyModule of the policy's architecture, without its adapter: the weights that come have it merged in.

    It takes no memory before `load` and after `release`. layer_dtype: of the decoder layers, where training computes with copies of
    them in that type; the same rounding then, and half of the memory.
    """

    def __init__(self, policy: PolicyModule, device: torch.device, layer_dtype: torch.dtype | None = None) -> None:
        trained = policy.base
        with torch.device("meta"):
            base = type(trained)(copy.deepcopy(trained.config))
        self.module = PolicyModule(base).eval()
        self._device = device
        base.to_empty(device="cpu")
        base.tie_weights()
        self._base: nn.Module = base.requires_grad_(False)
        layers = decoder_layers(base) if layer_dtype is not None else []
        self._rounded = {id(p) for layer in layers for p in layer.parameters()}
        self._layer_dtype = layer_dtype
        self.release()
        buffers = dict(trained.named_buffers())
        for path, owner in base.named_modules():
            for name, _ in list(owner.named_buffers(recurse=False)):
                full = f"{path}.{name}" if path else name
                owner._buffers[name] = buffers[full].detach().clone().to(device)

    def load(self, weights: PolicyWeights) -> tuple[int, int]:
        """Takes the weights; returns how many tensors of how many bytes. All processes call it."""
        missing = {id(p): name for name, p in self._base.named_parameters()}
        count = size = 0
        for name, tensor in weights:
            parameter = self._base.get_parameter(name)
            dtype = self._layer_dtype if id(parameter) in self._rounded else tensor.dtype
            parameter.data = tensor.to(self._device, dtype)
            missing.pop(id(parameter), None)
            count, size = count + 1, size + tensor.numel() * tensor.element_size()
        assert not missing, f"no weights came for {sorted(missing.values())[:5]}"
        return count, size

    def release(self) -> None:
        """Lets go of the weights."""
        for parameter in self._base.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)
