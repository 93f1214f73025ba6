"""Packed attention and the chunked head against references written out in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpu.common import DEVICE, REHEARSAL, bounds, check, distance, emit, peak_over, timed
from torch import Tensor

from llmrl.functional.logprobs import linear_logprobs, linear_weighted_nll
from llmrl.models.attention import PackedLayout, choose_kernel

BOUND = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 2e-3}  # float32: the order of sums differs
LAYERS = (  # type, (heads, key heads, width), window
    (torch.bfloat16, (8, 8, 64), None),
    (torch.bfloat16, (14, 2, 64), None),
    (torch.bfloat16, (12, 2, 128), None),
    (torch.bfloat16, (8, 4, 128), 100),
    (torch.float16, (8, 2, 128), None),
    (torch.float32, (8, 2, 64), None),
    (torch.float32, (8, 2, 64), 100),
)


@check
def attention() -> None:
    """Every kind of layer: output and all three gradients. Without and with a beginning that several documents share."""
    lengths = [1, 7, 64, 133] if REHEARSAL else [1, 7, 333, 64, 512, 130]
    # Two trunks, each followed by documents that read its first tokens; and one document that nobody shares.
    trunks = [90, 40, 1, 120, 33, 5, 77] if REHEARSAL else [90, 40, 1, 200, 333, 5, 77]
    second = sum(trunks[:3])
    shared = ((0, 0), (0, 60), (0, 90), (second, 0), (second, trunks[3]), (second, 100), (sum(trunks[:6]), 0))
    for dtype, sizes, window in LAYERS:
        _attention("attention", dtype, sizes, window, lengths, ())
        _attention("attention/shared_prompts", dtype, sizes, window, trunks, shared)


def _attention(
    name: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    window: int | None,
    lengths: Sequence[int],
    prefixes: tuple[tuple[int, int], ...],
) -> None:
    heads, kv, dim = sizes
    total = sum(lengths)
    shapes = ((heads, dim), (kv, dim), (kv, dim))
    q, k, v = (torch.randn(1, h, total, d, device=DEVICE, dtype=dtype, requires_grad=True) for h, d in shapes)
    grad = torch.randn(1, total, heads, dim, device=DEVICE, dtype=dtype)
    cu_seqlens, host, longest = bounds(lengths)
    longest = max([longest, *(own + before for own, (_, before) in zip(lengths, prefixes))])
    out = PackedLayout(cu_seqlens, host, longest, prefixes).attend(q, k, v, scale=dim**-0.5, window=window)
    got = torch.autograd.grad(out, (q, k, v), grad)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = written_out(*wide, lengths, window, prefixes or ((0, 0),) * len(lengths))
    reference = torch.autograd.grad(want, wide, grad.double())
    gaps = [distance(out, want), *(distance(a, b) for a, b in zip(got, reference))]
    emit(
        name, max(gaps) < BOUND[dtype], kernel=choose_kernel(q, v, softcap=None, dropout=0.0), dtype=str(dtype),
        heads=f"{heads}/{kv}x{dim}", window=window, output=gaps[0], gradients=max(gaps[1:]), bound=BOUND[dtype],
    )  # fmt: skip


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    window: int | None,
    prefixes: Sequence[tuple[int, int]],
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with a [T, T] mask made from what each token may see, [1, T, H, D]."""
    repeat, total = q.shape[1] // k.shape[1], sum(lengths)
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    seen = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for own, (trunk, before) in zip(lengths, prefixes):
        columns = torch.tensor([*range(trunk, trunk + before), *range(start, start + own)])
        back = torch.arange(before, before + own)[:, None] - torch.arange(before + own)
        seen[start : start + own, columns] = (back >= 0) & (back < (window or total))
        start += own
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~seen.to(q.device), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@check
def head() -> None:
    """Log-probs, entropies, their gradients and the weighted loss against full logits; memory against full float32 logits."""
    rows, vocabulary = (60, 2000) if REHEARSAL else (600, 32_000)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        hidden = torch.randn(rows, 256, device=DEVICE, dtype=dtype, requires_grad=True)
        weight = (torch.randn(vocabulary, 256, device=DEVICE) * 0.05).to(dtype).requires_grad_()
        targets = torch.randint(vocabulary, (rows,), device=DEVICE)
        a, b = torch.randn(2, rows, device=DEVICE)
        logprobs, entropy = linear_logprobs(hidden, weight, targets, temperature=0.7, entropy=True)
        assert entropy is not None
        got = torch.autograd.grad((a * logprobs + b * entropy).sum(), (hidden, weight))
        x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
        full = torch.log_softmax(x @ w.T / 0.7, -1)
        wanted = full.gather(1, targets[:, None])[:, 0], -(full.exp() * full).sum(-1)
        reference = torch.autograd.grad((a * wanted[0] + b * wanted[1]).sum(), (x, w), retain_graph=True)
        gaps = [distance(logprobs, wanted[0]), distance(entropy, wanted[1]), *map(distance, got, reference)]
        emit("head", max(gaps) < bound, dtype=str(dtype), logprobs=gaps[0], entropy=gaps[1], gradients=max(gaps[2:]))
        loss, _ = linear_weighted_nll(hidden, weight, targets, a, temperature=0.7)
        got = torch.autograd.grad(loss, (hidden, weight))
        gaps = list(map(distance, got, torch.autograd.grad(-(a * wanted[0]).sum(), (x, w))))
        emit("head/weighted_nll", max(gaps) < bound, dtype=str(dtype), gradients=max(gaps))
    _head_memory(*((256, 1024, 64) if REHEARSAL else (16_384, 151_936, 1024)))


def _head_memory(rows: int, vocabulary: int, width: int) -> None:
    """Of both ways through the head, less than half of one copy of the logits in float32."""
    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=DEVICE) * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    weights = torch.full((rows,), 1 / rows, device=DEVICE)
    logits_mb = rows * vocabulary * 4 / 2**20

    def scored() -> None:
        linear_logprobs(hidden, weight, targets, entropy=True)[0].sum().backward()
        hidden.grad = weight.grad = None

    def trained() -> None:
        linear_weighted_nll(hidden, weight, targets, weights)[0].backward()
        hidden.grad = weight.grad = None

    for name, work in (("logprobs+entropy", scored), ("weighted_nll", trained)):
        work()
        seconds: list[float] = []
        with timed(seconds):
            work()
        peak = peak_over(work)
        emit(
            f"head/memory/{name}", peak < logits_mb / 2, peak_mb=peak, one_copy_of_logits_mb=logits_mb, seconds=seconds[0],
            tflops=6 * rows * vocabulary * width / seconds[0] / 1e12,
        )  # fmt: skip
