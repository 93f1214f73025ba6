"""One update, computed in ways that must not matter: how it is cut, what is computed once or again, where activations wait.

Half precision rounds, and sums on a GPU come in any order, so the bounds are not 0: each is stated in its line. The yardstick is the first
of them, what bfloat16 itself costs against float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu.common import (
    DEVICE,
    REHEARSAL,
    SHAPES,
    autocast,
    check,
    distance,
    emit,
    examples,
    gradient_of,
    lengths_of,
    make_model,
)
from torch import Tensor

from llmrl.data.packing import cut, pack, unshared
from llmrl.models.forward import PolicyModule
from llmrl.train.offload import offload_activations
from llmrl.types import Example

SHAPE = SHAPES["0.5B"]
LAYERS = 2 if REHEARSAL else 4
FLOAT32, ROUNDED, AGAIN = 0.05, 0.02, 0.01
"""Bounds of a gradient's distance: bfloat16 to float32, two ways in bfloat16 that round at different places, the same kernels on the same numbers."""


class Result(NamedTuple):
    """Of one update: the loss, and every gradient in one vector."""

    loss: float
    gradient: Tensor


@check
def update() -> None:
    """The loss and the gradient of one update in bfloat16 autocast with float32 weights: against float32, cut, checkpointed, offloaded."""
    rows = examples(lengths_of(12, 20, 60 if REHEARSAL else 300), SHAPE.vocabulary)
    module = PolicyModule(make_model(SHAPE, layers=LAYERS).train())
    base = _update(module, [rows])
    exact = _update(module, [rows], half=False)
    # The head's chunks and sums over documents are in float32, so the loss moves far less than the gradient.
    _compare("float32", base, exact, FLOAT32, loss_bound=2e-3)
    emit("update/repeated", gradient=distance(_update(module, [rows]).gradient, base.gradient))
    ways = {
        "microbatches": cut(rows, sum(map(len, rows)) // 4),
        "one_document_at_a_time": [[row] for row in rows],
        "other_order": [rows[::-1]],
    }
    for name, batches in ways.items():
        _compare(name, _update(module, batches), base, ROUNDED)
    _compare("offloaded", _update(module, [rows], around=offload_activations(torch.device(DEVICE))), base, AGAIN)
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _compare("checkpointed", _update(module, [rows]), base, AGAIN)
    _compare("float32/microbatches", _update(module, ways["microbatches"], half=False), exact, 1e-4, loss_bound=1e-5)


def _update(
    module: Any,
    batches: Sequence[list[Example]],
    *,
    half: bool = True,
    around: AbstractContextManager[Any] | None = None,
) -> Result:
    total = sum(int(e.loss_mask.sum()) for batch in batches for e in batch)
    loss = 0.0
    for rows in batches:
        batch = pack(rows, device=DEVICE)
        with autocast(half), around or nullcontext():
            out = module(batch, weights=batch.select("weights") / total)
        out.loss.backward()
        loss += float(out.loss.detach())
    return Result(loss, gradient_of(module))


def _compare(name: str, got: Result, base: Result, bound: float, loss_bound: float = 1e-3) -> None:
    loss, gradient = abs(got.loss - base.loss) / abs(base.loss), distance(got.gradient, base.gradient)
    ok = loss < loss_bound and gradient < bound
    emit(f"update/{name}", ok, loss=loss, gradient=gradient, loss_bound=loss_bound, gradient_bound=bound)


@check
def packed_model() -> None:
    """Log-probs of documents packed against one at a time, and of completions behind a prompt that is computed once against each with
    its own: in float32 and with bfloat16 weights, and their gradients."""
    rows, shared = examples(lengths_of(6, 20, 300), SHAPE.vocabulary), _group_rows()
    for dtype, gap_bound, bound in ((torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.02, 0.05)):
        module = PolicyModule(make_model(SHAPE, dtype, layers=LAYERS))
        pairs = (("packed_model", [rows], [[row] for row in rows]), ("shared_prompts", [shared], [unshared(shared)]))
        for name, one, other in pairs:
            (a, ga), (b, gb) = _scores(module, one), _scores(module, other)
            gap, gradient = float((a - b).abs().mean()), distance(ga, gb)
            ok = gap < gap_bound and gradient < bound
            emit(name, ok, dtype=str(dtype), mean_abs_gap=gap, gradients=gradient, bounds=[gap_bound, bound])


def _scores(module: Any, batches: Sequence[list[Example]]) -> tuple[Tensor, Tensor]:
    logprobs = torch.cat([module(pack(batch, device=DEVICE)).logprobs for batch in batches])
    logprobs.mean().backward()
    return logprobs.detach(), gradient_of(module)


def _group_rows() -> list[Example]:
    """Three completions behind each of four prompts."""
    rng, rows = np.random.default_rng(0), []
    for unit in range(4):
        prompt = rng.integers(1, SHAPE.vocabulary, rng.integers(50, 200)).astype(np.int32)
        for i in range(3):
            own = rng.integers(1, SHAPE.vocabulary, rng.integers(1, 150)).astype(np.int32)
            ids = own if i else np.concatenate([prompt, own])
            mask = np.arange(len(ids)) >= len(ids) - len(own)
            rows.append(Example(ids, mask, unit=unit, prefix=len(prompt) if i else 0))
    return rows
