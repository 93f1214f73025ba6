"""Log-probabilities and entropies of tokens straight from hidden states: the [K, V] logits never exist as a whole.

K tokens, D hidden size, V vocabulary. Rows go through the head in chunks, so that the memory beside the gradients is a few
buffers of one chunk. Matrix products run in the type that the model computes in (autocast is followed); log-softmax, entropy
and the gradient of the weight are accumulated in float32 at least.

With raw = hidden W^T + bias, the logits are z = softcap(logit_scale * raw) / temperature, softcap(a) = c tanh(a / c), and
    log p(y) = z_y - logsumexp(z)          d/dz_j = 1[j = y] - p_j
    H        = -sum_j p_j log p_j          d/dz_j = -p_j (log p_j + H)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

MIN_ROWS = 16  # fewer rows a chunk would read the whole weight for hardly any work


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(targets) [K] and, if asked for, the entropies [K], in nats; float32 (float64 if the inputs are).

    hidden [K, D], weight [V, D], targets [K] int64, bias [V]. Both outputs are differentiable; the logits are computed again in
    the backward pass. `chunk_bytes` bounds one logits buffer (default: 32 MiB on the CPU, 512 MiB elsewhere); at most three
    such buffers are alive. K = 0 gives empty outputs that still depend on hidden and weight, so that a process without tokens
    takes part in the gradient reduction. Raises ValueError for shapes or settings that don't fit.
    """
    head = _head(hidden, weight, targets, bias, temperature, softcap, logit_scale, chunk_bytes)
    return _LinearLogprobs.apply(hidden, weight, bias, targets, head, entropy)


def linear_weighted_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    loss_type: Literal["nll", "dft"] = "nll",
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The scalar sum_t weights_t * loss_t, and the negative log-likelihoods [K] detached.

    loss_t is -log p ("nll") or -sg(p) log p ("dft", dynamic fine-tuning, Wu et al. 2025, arXiv 2508.05629). Since the weights are
    known beforehand, the gradient is made in the forward pass while a chunk's logits are alive: there is no second projection.
    The backward pass scales it, once: a second backward over the same graph raises RuntimeError. `weights` [K] get no gradient.
    Everything else as in `linear_logprobs`.
    """
    if loss_type not in ("nll", "dft"):
        raise ValueError(f'loss_type is {loss_type!r}; it must be "nll" or "dft"')
    if weights.shape != targets.shape:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, targets {tuple(targets.shape)}; give one weight a token"
        )
    head = _head(hidden, weight, targets, bias, temperature, softcap, logit_scale, chunk_bytes)
    # Under no_grad a function's needs_input_grad still says what requires a gradient, so the work is switched off here.
    return _LinearWeightedNLL.apply(hidden, weight, bias, targets, weights, head, loss_type, torch.is_grad_enabled())


@dataclass(frozen=True)
class _Head:
    """How logits come from hidden states, and in which types."""

    temperature: float
    softcap: float | None
    logit_scale: float
    matmul_dtype: torch.dtype
    dtype: torch.dtype  # of the logits
    rows: int  # of one chunk

    @property
    def factor(self) -> float:
        """dz / d raw, the slope of the soft cap aside."""
        return self.logit_scale / self.temperature

    def chunks(self, k: int) -> Iterator[slice]:
        return (slice(i, min(i + self.rows, k)) for i in range(0, k, self.rows))

    def buffer(self, hidden: Tensor, vocab: int) -> Tensor:
        return torch.empty(min(self.rows, len(hidden)), vocab, dtype=self.dtype, device=hidden.device)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """z [n, V] of the rows x [n, D], written into the first n rows of `out`."""
        z = out[: len(x)]
        _mm_into(z, x, weight.t())
        if bias is not None:
            z.add_(bias)
        if self.softcap is not None:
            z.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.factor != 1.0:
            z.mul_(self.factor)
        return z

    def slope(self, z: Tensor) -> Tensor | None:
        """d softcap(a) / da at the logits z, None where it is 1 everywhere."""
        if self.softcap is None:
            return None
        return (z * (self.temperature / self.softcap)).square_().neg_().add_(1.0)


def _head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
) -> _Head:
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} "
            "must be [K, D], [V, D] and [K]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; the head has {weight.shape[0]} outputs")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probs need one above 0 (greedy decoding has none)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; give a positive number, or None for no cap")
    device = hidden.device.type
    matmul_dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if matmul_dtype != torch.float64 and torch.is_autocast_enabled(device):
        matmul_dtype = torch.get_autocast_dtype(device)
    dtype = torch.promote_types(matmul_dtype, torch.float32)
    if chunk_bytes is None:
        chunk_bytes = (
            2**25 if device == "cpu" else 2**29
        )  # CPU: near the caches; elsewhere: enough rows for a full matrix product
    rows = max(MIN_ROWS, chunk_bytes // (weight.shape[0] * dtype.itemsize))
    return _Head(temperature, softcap, logit_scale, matmul_dtype, dtype, rows)


def _mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, where `out` may have more precision than the factors."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)  # the accumulator as it is, not rounded to the factors' type first
    else:
        out.copy_(torch.mm(a, b))


class _Gradients:
    """Gradients of hidden, weight and bias, summed up chunk by chunk; None where nobody needs one."""

    def __init__(self, hidden: Tensor, weight: Tensor, head: _Head, needs: tuple[bool, bool, bool]) -> None:
        self.weight_in = weight
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=head.dtype) if needs[1] else None
        self.bias = torch.zeros_like(weight[:, 0], dtype=head.dtype) if needs[2] else None
        self.matmul_dtype = head.matmul_dtype

    def add(self, chunk: slice, x: Tensor, dz: Tensor, scale: Tensor) -> None:
        """Adds the gradient scale[:, None] * dz [n, V] of the raw logits of the rows x [n, D].

        The row factors stay outside: they cost nothing on [n, D], and dz keeps entries of order 1 for a half-precision product.
        """
        if self.bias is not None:
            self.bias.addmv_(dz.t(), scale)
        dz = dz.to(self.matmul_dtype)
        if self.hidden is not None:
            self.hidden[chunk] = torch.mm(dz, self.weight_in).to(scale.dtype).mul_(scale[:, None])
        if self.weight is not None:
            scaled = (x * scale[:, None]).to(self.matmul_dtype)
            if self.weight.dtype == self.matmul_dtype:
                self.weight.addmm_(dz.t(), scaled)
            else:
                self.weight.add_(torch.mm(dz.t(), scaled))


def _normalise(z: Tensor) -> Tensor:
    """exp(z - max z) in place; returns logsumexp(z) [n]. Divide by exp(logsumexp - max), the row sums, for probabilities."""
    top = z.amax(1, keepdim=True)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    z.div_(total)
    return total.log_().add_(top).squeeze(1)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head, want_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        k, vocab = len(hidden), len(weight)
        logprobs, lse = (torch.empty(k, dtype=head.dtype, device=hidden.device) for _ in range(2))
        entropy = torch.empty_like(lse) if want_entropy else None
        with torch.autocast(hidden.device.type, enabled=False):
            x, w = hidden.to(head.matmul_dtype), weight.to(head.matmul_dtype)
            buffer = head.buffer(x, vocab)
            spare = torch.empty_like(buffer) if want_entropy else None
            for chunk in head.chunks(k):
                z = head.logits(x[chunk], w, bias, buffer)
                target = z.gather(1, targets[chunk, None]).squeeze(1)
                top = z.amax(1, keepdim=True)
                z.sub_(top)
                if entropy is None or spare is None:
                    total = z.exp_().sum(1)
                else:
                    e = torch.exp(z, out=spare[: len(z)])
                    total = e.sum(1)
                    entropy[chunk] = total.log() - z.mul_(e).sum(1) / total
                lse[chunk] = total.log_().add_(top.squeeze(1))
                logprobs[chunk] = target - lse[chunk]
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.head = head
        ctx.set_materialize_grads(False)  # an output that nothing depends on then costs nothing in the backward pass
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        head: _Head = ctx.head
        with torch.autocast(hidden.device.type, enabled=False):
            x, w = hidden.to(head.matmul_dtype), weight.to(head.matmul_dtype)
            gradients = _Gradients(hidden, w, head, ctx.needs_input_grad[:3])
            if grad_logprobs is None:
                grad_logprobs = torch.zeros_like(lse)
            buffer = head.buffer(x, len(weight))
            spare = torch.empty_like(buffer) if grad_entropy is not None else None
            for chunk in head.chunks(len(hidden)):
                z = head.logits(x[chunk], w, bias, buffer)
                slope, y, g = head.slope(z), targets[chunk, None], grad_logprobs[chunk, None]
                z.sub_(lse[chunk, None])
                if spare is None or grad_entropy is None:
                    dz = z.exp_().scatter_add_(1, y, torch.full_like(g, -1.0))
                    scale = g.squeeze(1) * -head.factor
                else:
                    p = torch.exp(z, out=spare[: len(z)])
                    dz = (
                        z.add_(entropy[chunk, None])
                        .mul_(-grad_entropy[chunk, None])
                        .sub_(g)
                        .mul_(p)
                        .scatter_add_(1, y, g)
                    )
                    scale = torch.full_like(lse[chunk], head.factor)
                gradients.add(chunk, x[chunk], dz if slope is None else dz.mul_(slope), scale)
        return gradients.hidden, _cast(gradients.weight, weight), _cast(gradients.bias, bias), None, None, None


class _LinearWeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor,
        head: _Head, loss_type: str, grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        needs = ctx.needs_input_grad[:3] if grad_enabled else (False, False, False)
        nll = torch.empty(len(hidden), dtype=head.dtype, device=hidden.device)
        weights = weights.to(head.dtype)
        # Weights are about 1 / (tokens of an update): taken relative to their peak, products in float16 stay above its underflow.
        peak = weights.abs().max().clamp_min_(torch.finfo(head.dtype).tiny) if len(weights) else weights.new_ones(())
        with torch.autocast(hidden.device.type, enabled=False):
            x, w = hidden.to(head.matmul_dtype), weight.to(head.matmul_dtype)
            gradients = _Gradients(hidden, w, head, needs)
            buffer = head.buffer(x, len(weight))
            for chunk in head.chunks(len(hidden)):
                z = head.logits(x[chunk], w, bias, buffer)
                slope, y = head.slope(z) if any(needs) else None, targets[chunk, None]
                target = z.gather(1, y).squeeze(1)
                nll[chunk] = _normalise(z) - target
                if any(needs):
                    scale = weights[chunk] / peak * head.factor
                    if loss_type == "dft":
                        scale = scale * (-nll[chunk]).exp()
                    z.scatter_add_(1, y, z.new_full((len(z), 1), -1.0))
                    gradients.add(chunk, x[chunk], z if slope is None else z.mul_(slope), scale)
        losses = nll * (-nll).exp() if loss_type == "dft" else nll
        ctx.gradients, ctx.peak = (gradients.hidden, gradients.weight, gradients.bias), peak
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(nll)
        return (weights * losses).sum(), nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of linear_weighted_nll was consumed by an earlier backward pass; run the forward again"
            )
        scale = grad_loss * ctx.peak
        # In place, and handed over: the gradient of a large head then exists once.
        grads = [None if g is None else g.mul_(scale).to(d) for g, d in zip(ctx.gradients, ctx.dtypes)]
        ctx.gradients = None
        return (*grads, None, None, None, None, None)


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or like is None else gradient.to(like.dtype)
