"""Activations in host memory until their backward.

Copies go through page-locked memory on the stream that computes, so nothing waits for them on the host and no order can be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MIN_BYTES = 2**16  # a smaller tensor saves less than its copies cost
HOST = "cpu"


@contextmanager
def offload_activations(device: torch.device) -> Iterator[None]:
    """Around a forward: what autograd keeps of it for the backward is in host memory until the backward asks for it.

    Parameters, their views and small tensors stay on `device`, as does all that lies elsewhere already: on the CPU nothing is
    moved. Values are copied bit for bit, with their strides, so gradients are the same bits too. The backward itself runs outside.

    Example: with offload_activations(device): loss = module(batch).logprobs.sum()
    """

    def pack(tensor: Tensor) -> Any:
        if tensor.device != device or tensor.nbytes < MIN_BYTES or _is_parameter(tensor):
            return tensor
        return tensor.device, _to_host(tensor)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        home, host = packed
        return host.to(home, non_blocking=True)

    if device.type == HOST:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _is_parameter(tensor: Tensor) -> bool:
    """A parameter or a view of one, such as the transposed weight that a linear layer keeps."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _to_host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
