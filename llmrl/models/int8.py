"""Linear layers whose frozen weight is kept in 8 bits. Imported where a recipe asks for them: it needs bitsandbytes.

Weights are bitsandbytes' (a scale a row, LLM.int8's, arXiv 2208.07339), products are not: LLM.int8 also rounds the inputs to 8 bits, all but
columns that are large anywhere in the batch, so that a document's log-probs would depend on what it is packed with. Here the weight is
widened for each product and the input is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn


def widen_for_products(model: nn.Module) -> None:
    """Makes the 8-bit layers of a model that was just loaded compute with `Int8Linear`."""
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.init_8bit_state()  # codes and scales then have one place, whatever peft or a move does to the parameter
            module.__class__ = Int8Linear


class Int8Linear(Linear8bitLt):
    """y = x W^T + b with W = codes * scales / 127, in the type of x or of autocast; W exists during a product only."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out: Tensor = _Product.apply(x.to(dtype), self.state.CB, self.state.SCB)
        return out if self.bias is None else out + self.bias.to(dtype)


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] from codes int8 [out, in] and scales float32 [out], the largest absolute value of each row."""
    return (codes * (scales / 127)[:, None]).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return x @ dequantised(codes, scales, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        codes, scales = ctx.saved_tensors
        return grad @ dequantised(codes, scales, grad.dtype), None, None
