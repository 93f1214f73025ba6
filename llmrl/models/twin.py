"""A plain copy of a sharded policy to sample from: decoding goes through the layers thousands of times, and gathers them once."""

from __future__ import annotations

import copy

import torch
from torch import nn

from llmrl.models.forward import PolicyModule
from llmrl.types import PolicyWeights


class Twin:
    """`module` is a PolicyModule of the policy's architecture, without its adapter: the weights that come have it merged in.

    It takes no memory before `load` and after `release`.
    """

    def __init__(self, policy: PolicyModule, device: torch.device) -> None:
        trained = policy.base
        with torch.device("meta"):
            base = type(trained)(copy.deepcopy(trained.config))
        self.module = PolicyModule(base).eval()
        self._device = device
        base.to_empty(device="cpu")
        base.tie_weights()
        self._base: nn.Module = base.requires_grad_(False)
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
            parameter.data = tensor.to(self._device)
            missing.pop(id(parameter), None)
            count, size = count + 1, size + tensor.numel() * tensor.element_size()
        assert not missing, f"no weights came for {sorted(missing.values())[:5]}"
        return count, size

    def release(self) -> None:
        """Lets go of the weights."""
        for parameter in self._base.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)
