"""A step without a trainer, from the parts that need torch, transformers and numpy alone; also with bfloat16 weights, optimizer included."""

from __future__ import annotations

from typing import Any

import torch
from gpu.common import (
    DEVICE,
    REHEARSAL,
    SHAPES,
    Peak,
    autocast,
    check,
    emit,
    examples,
    lengths_of,
    make_model,
    seen_pairs,
    timed,
)

from llmrl.data.packing import cut, pack
from llmrl.experience.batch import to_examples, weigh, with_advantage
from llmrl.experience.collect import Experience, Group
from llmrl.functional.advantages import group_advantages
from llmrl.functional.objective import ObjectiveSettings, policy_objective
from llmrl.models.forward import PolicyModule
from llmrl.rollout.local import LocalEngine
from llmrl.types import Prompt, Sampling, ScoredRollout

SHAPE = SHAPES["0.5B"]
TOKENS = 512 if REHEARSAL else 16_384  # of a microbatch


def matmul_tflops() -> float:
    """bfloat16 matrix products of 8192^3, in 10^12 operations a second."""
    size, count = (64, 2) if REHEARSAL else (8192, 20)
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    seconds: list[float] = []
    with timed(seconds):
        for _ in range(count):
            a @ b
    return count * 2 * size**3 / seconds[0] / 1e12


@check
def sft_step() -> None:
    """Tokens a second, memory and utilisation of a 0.5B model: float32 weights under bfloat16 autocast, and bfloat16 throughout."""
    peak = matmul_tflops()
    emit("matmul", tflops_bf16=peak)
    for name, dtype in (("autocast", torch.float32), ("bfloat16", torch.bfloat16)):
        _sft_speed(name, dtype, peak)


def _sft_speed(name: str, dtype: torch.dtype, tflops: float) -> None:
    module = PolicyModule(make_model(SHAPE, dtype))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    rows = examples(lengths_of(8, 16, 64) if REHEARSAL else lengths_of(160, 64, 1024), SHAPE.vocabulary)
    total = sum(int(e.loss_mask.sum()) for e in rows)
    batches = [pack(b, device=DEVICE) for b in cut(rows, TOKENS)]
    tokens = sum(map(len, rows))
    losses: list[float] = []

    def step() -> None:
        loss = torch.zeros((), device=DEVICE)
        for batch in batches:
            with autocast(dtype == torch.float32):
                out: Any = module(batch, weights=batch.select("weights") / total)
            out.loss.backward()
            loss += out.loss.detach()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))

    for _ in range(2):
        step()
    seconds: list[float] = []
    memory = Peak()
    with timed(seconds):
        for _ in range(3):
            step()
    rate = 3 * SHAPE.flops(tokens, total, seen_pairs(rows)) / seconds[0] / 1e12
    emit(
        f"sft_step/{name}", losses[-1] < losses[0], tokens=tokens, tokens_per_second=3 * tokens / seconds[0], tflops=rate,
        of_matmul=rate / tflops, step_peak_mb=memory.megabytes(), first_loss=losses[0], last_loss=losses[-1],
    )  # fmt: skip


class Numbers:
    """The part of a tokenizer that the local engine asks for: token ids as text."""

    def decode(self, ids: Any, **_: object) -> str:
        return " ".join(map(str, ids))

    def batch_decode(self, rows: Any, **_: object) -> list[str]:
        return [self.decode(row) for row in rows]


@check
def grpo_step() -> None:
    """Sampling with the local engine, the gap between sampled and recomputed log-probs, and one policy update.

    The gap has a bound in float32 and is reported in bfloat16, whose rounding it is.
    """
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, None)):
        _grpo_speed(dtype, bound)


def _grpo_speed(dtype: torch.dtype, bound: float | None) -> None:
    count, length = (4, 8) if REHEARSAL else (32, 128)
    module = PolicyModule(make_model(SHAPE, dtype))
    engine = LocalEngine(module, Numbers(), stop_token_ids=(0,))
    prompts = [Prompt(str(i), tuple(range(5 + i, 105 + 3 * i)), "p") for i in range(count)]
    engine.generate(prompts[:2], 8, Sampling(max_tokens=4))
    seconds: list[float] = []
    with timed(seconds):
        groups = engine.generate(prompts, 8, Sampling(max_tokens=length, temperature=0.8, seed=1))
    flat = [r for g in groups for r in g]
    new = sum(len(r.completion.ids) for r in flat)
    rewards = torch.tensor([float(r.completion.ids[0] % 7) for r in flat], dtype=torch.float64)
    advantages = group_advantages(rewards, torch.arange(count).repeat_interleave(8), scale="group").tolist()
    scored = [Group(i, [ScoredRollout(r, 0.0, {}) for r in g]) for i, g in enumerate(groups)]
    rows = to_examples(Experience(1, scored), unit_tokens=TOKENS)
    rows, total = weigh([with_advantage(e, a) for e, a in zip(rows, advantages)], "token_mean", length, list)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    gap = 0.0
    with timed(seconds):
        for part in cut(rows, TOKENS):
            batch = pack(part, device=DEVICE)
            out: Any = module(batch, temperature=0.8, entropy=True)
            old = out.logprobs.detach()
            loss, _ = policy_objective(
                out.logprobs, old_logprobs=old, advantages=batch.select("advantages"), weights=batch.select("weights"),
                sequence=batch.sequence_of_positions(), num_sequences=batch.num_sequences, token_share=1 / total,
                settings=ObjectiveSettings(), entropy=out.entropy,
            )  # fmt: skip
            loss.backward()
            gap += float((old - batch.select("sampled_logprobs")).abs().sum()) / total
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0))
        optimizer.step()
    emit(
        "grpo_step", 0 < norm < float("inf") and (bound is None or gap < bound), dtype=str(dtype), logprob_gap=gap, bound=bound,
        grad_norm=norm, new_tokens=new, sampled_tokens_per_second=new / seconds[0],
        trained_tokens_per_second=sum(map(len, rows)) / seconds[1],
    )  # fmt: skip
