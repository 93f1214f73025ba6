"""SFT, DPO and GRPO by their trainers, for the shapes of Qwen2.5-0.5B and 1.5B: tokens a second, utilisation, memory against the estimate.

Utilisation counts what training needs (`Shape.flops`, docs/scale.md): 6 a layer weight and token, 6 a head weight and token in the loss, 12 x layers x
width for each token and token that it sees; for DPO 8, 8 and 16, with the forward of the reference. Padding and what is computed twice do
not count. `of_peak` is against the maker's figure for the GPU, `of_matmul` against a product of 8192^3 just before.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu.bare import matmul_tflops
from gpu.common import (
    REHEARSAL,
    SHAPES,
    Peak,
    Shape,
    check,
    emit,
    lacks,
    lengths_of,
    make_model,
    make_tokenizer,
    missing,
    result_of,
    seen_pairs,
    synchronize,
)

from llmrl.train.gpus import GPUS
from llmrl.types import Example

STEPS, WARM = (3, 1) if REHEARSAL else (6, 2)  # of them, not timed
ROWS, SHORTEST, LONGEST = (8, 16, 64) if REHEARSAL else (64, 64, 1024)  # of a step
TOKENS = 256 if REHEARSAL else 16_384  # of a microbatch
PROMPTS, GENERATIONS, NEW = (4, 4, 8) if REHEARSAL else (32, 8, 256)
WITHIN = 0.15  # of the measured peak, as `llmrl check` promises


@check
def speed() -> None:
    if lacks("speed"):
        return
    matmul = matmul_tflops()
    emit("matmul", tflops_bf16=matmul)
    for size, shape in SHAPES.items():
        ours = {kind: measure(f"{kind}/{size}", kind, shape, matmul) for kind in ("sft", "dpo", "grpo")}
        for task, kind in (("sft", "sft"), ("sft-bfd", "sft"), ("dpo", "dpo")):
            beside_peer(task, size, *ours[kind])


@check
def savers() -> None:
    """What saves memory, in SFT of the 0.5B shape: its speed and, as a share of the plain run's, its peak."""
    if lacks("savers"):
        return
    shape = SHAPES["0.5B"]
    plain = measure("sft/plain", "sft", shape, None)
    eight: dict[str, dict[str, Any]] = {"adamw_8bit": {"optimizer": "adamw_8bit"}}
    ways: dict[str, dict[str, Any]] = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "activation_offloading": {"activation_offloading": True},
        "lora": {"lora": {"r": 16}},
    } | eight | {name: {"lora": {"r": 16}, "quantization": name} for name in ("nf4", "int8")}  # fmt: skip
    with tempfile.TemporaryDirectory() as saved:
        make_model(shape).save_pretrained(saved)
        words_alone = str(Path(saved, "tokenizer"))  # beside a config.json transformers would read it as Qwen2s own
        make_tokenizer(shape.vocabulary).save_pretrained(words_alone)
        for name, keys in ways.items():
            if keys.keys() & {"optimizer", "quantization"} and missing(["bitsandbytes"]):
                emit(f"savers/{name}", skipped="not installed: bitsandbytes")
                continue
            rate, peak = measure(
                f"sft/{name}", "sft", shape, None, model_name_or_path=saved, tokenizer_name_or_path=words_alone, **keys
            )
            share = {"peak_share": peak / plain[1]} if plain[1] else {}
            emit(f"savers/{name}", None if REHEARSAL else peak < plain[1], speed_share=rate / plain[0], **share)


def measure(name: str, kind: str, shape: Shape, matmul: float | None, **keys: Any) -> tuple[float, float]:
    """Prints the figures of a trainer; returns (tokens a second as the peer counts them, each answer with its prompt; peak in MiB).

    matmul: what the utilisation is relative to; without, it is left out. keys: further keys of the recipe.
    """
    watch, memory = Watch(), Peak()
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(kind, shape, out, watch, **keys)
        watch.attach(trainer)
        with contextlib.suppress(Enough):
            trainer.train()
    peak = memory.megabytes()
    rows = [e for step in watch.rows[WARM:] for e in step]
    tokens, in_loss = sum(map(len, rows)), sum(int(e.loss_mask.sum()) for e in rows)
    losses = [m["loss"] for m in watch.logged]
    figures: dict[str, Any] = {"tokens": tokens, "tokens_per_second": tokens / watch.seconds}
    if matmul is not None:
        flops = shape.flops(tokens, in_loss, seen_pairs(rows), passes=3 if kind == "sft" else 4)
        rate = flops / watch.seconds / 1e12
        figures |= {"tflops": rate, "of_matmul": rate / matmul, "of_peak": of_peak(rate)}
    if kind == "grpo":
        figures["sampled_tokens_per_second"] = in_loss / watch.sampling
        figures["logprob_gap"] = watch.logged[-1]["sampling/sampling_logp_difference/mean"]
    emit(f"speed/{name}", all(map(math.isfinite, losses)), **figures, first_loss=losses[0], last_loss=losses[-1])
    foreseen = foresee(trainer)
    if REHEARSAL:
        emit(f"memory/{name}", foreseen > 0, foreseen_mb=foreseen)
    else:
        ratio = foreseen / peak
        emit(
            f"memory/{name}",
            abs(ratio - 1) <= WITHIN,
            foreseen_mb=foreseen,
            measured_mb=peak,
            ratio=ratio,
            within=WITHIN,
        )
    return sum(len(e) + e.prefix for e in rows) / watch.seconds, peak


def foresee(trainer: Any) -> float:
    """MiB that `llmrl check` foresees for this trainer's recipe and rows."""
    from llmrl.cli.check import memory_of
    from llmrl.cli.plan import solve
    from llmrl.models.load import load_skeleton
    from llmrl.models.shape import shape_of

    config = trainer.config
    # The weights of a quantised model are packed, so its shape is read off one that is not.
    model = trainer.model if config.quantization is None else load_skeleton(config)[0]
    return memory_of(config, solve(config, lengths_in(trainer)), shape_of(model)).peak / 2**20


def lengths_in(trainer: Any) -> list[int]:
    """Tokens of each row, pair (both sides) or prompt, as `llmrl check` takes them."""
    if trainer.kind == "grpo":
        return [len(p.ids) for p in trainer.rollouts.prompts]
    width = 2 if trainer.kind == "dpo" else 1
    sizes = list(map(len, trainer.examples))
    return [sum(sizes[i : i + width]) for i in range(0, len(sizes), width)]


def of_peak(tflops: float) -> float | None:
    """Share of what the maker says that this GPU does; None for one that is not in `llmrl plan`'s list."""
    name = "" if REHEARSAL else torch.cuda.get_device_name().lower()
    found = [gpu for key, gpu in GPUS.items() if key.partition("-")[0] in name]
    return tflops * 1e12 / found[0].flops if found else None


def beside_peer(task: str, size: str, tokens_per_second: float, peak_mb: float) -> None:
    """The same rows and steps by TRL, in a process of its own: above 1, ours is faster or takes less."""
    name = f"beside_trl/{task}/{size}"
    if lost := missing(["trl"]):
        emit(name, skipped=f"not installed: {', '.join(lost)}")
        return
    theirs = result_of("peer", task, size)
    speed_ratio = tokens_per_second / theirs["tokens_per_second"]
    emit(name, speed_ratio=speed_ratio, memory_ratio=theirs["peak_mb"] / peak_mb if peak_mb else None, **theirs)


def words(count: int, seed: int, vocabulary: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(1, vocabulary, (count,), generator=generator).tolist())


def sft_rows(vocabulary: int, rows: int = ROWS * STEPS) -> list[dict[str, str]]:
    """Half of each row, a prompt of random words, is not in the loss."""
    halves = [n // 2 for n in lengths_of(rows, SHORTEST, LONGEST)]
    return [
        {"prompt": words(n, 2 * i, vocabulary), "completion": " " + words(n, 2 * i + 1, vocabulary)}
        for i, n in enumerate(halves)
    ]


def pair_rows(vocabulary: int) -> list[dict[str, str]]:
    """Prompts of a quarter, and two answers of a half each of a row's length."""
    quarters = [n // 4 for n in lengths_of(ROWS // 2 * STEPS, SHORTEST, LONGEST)]
    return [
        {"prompt": words(n, 3 * i, vocabulary), "chosen": " " + words(2 * n, 3 * i + 1, vocabulary),
         "rejected": " " + words(2 * n, 3 * i + 2, vocabulary)}
        for i, n in enumerate(quarters)
    ]  # fmt: skip


class Enough(Exception):
    """Ends a run after its last timed step, before checkpoint and model are written."""


class Watch:
    """A callback that keeps of every step when it ended, what it logged, and the rows of its update."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.rows: list[list[Example]] = []
        self._latest: list[Example] = []

    def attach(self, trainer: Any) -> None:
        """Looks on when rows are cut into microbatches: a step's last cut is its update's, those before are scored by the reference."""
        cut = trainer.microbatches

        def looked_on(rows: list[Example]) -> list[list[Example]]:
            self._latest = rows
            return cut(rows)

        trainer.microbatches = looked_on

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        synchronize()
        self.ends.append(time.perf_counter())
        self.logged.append(metrics)
        self.rows.append(self._latest)
        if step == STEPS:
            raise Enough

    @property
    def seconds(self) -> float:
        """Of all timed steps, without what they sampled."""
        return self.ends[-1] - self.ends[WARM - 1] - self.sampling

    @property
    def sampling(self) -> float:
        return sum(m.get("rollout/seconds", 0.0) for m in self.logged[WARM:])


def trainer_of(kind: str, shape: Shape, out: str, watch: Watch, **keys: Any) -> Any:
    """The trainer of `kind` on a new model of this shape, or on the one that `keys`, further keys of the recipe, name."""
    from llmrl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    common = {
        "model_name_or_path": "a shape from its configuration", "output_dir": out, "mixed_precision": "bf16", "max_steps": STEPS + 1,
        "tokens_per_microbatch": TOKENS, "num_samples_logged": 0, "lr_scheduler_type": "constant", "learning_rate": 1e-6,
    } | keys  # fmt: skip
    given: dict[str, Any] = {"callbacks": [watch]}
    if "model_name_or_path" not in keys:
        given |= {"model": make_model(shape), "tokenizer": make_tokenizer(shape.vocabulary)}
    if kind == "sft":
        return SFTTrainer(SFTConfig(batch_size=ROWS, **common), train_dataset=sft_rows(shape.vocabulary), **given)
    if kind == "dpo":
        config = DPOConfig(batch_size=ROWS // 2, reference_logprobs="on_the_fly", **common)
        return DPOTrainer(config, train_dataset=pair_rows(shape.vocabulary), **given)
    lengths = lengths_of(PROMPTS, SHORTEST, LONGEST // 4)
    prompts = [{"prompt": words(n, i, shape.vocabulary)} for i, n in enumerate(lengths)]
    sampled = {"batch_size": PROMPTS, "num_generations": GENERATIONS, "max_completion_length": NEW}
    return GRPOTrainer(GRPOConfig(**sampled, **common), train_dataset=prompts, reward_funcs=odd_share, **given)


def odd_share(completion_ids: Any, **_: object) -> list[float]:
    """A reward of random text that differs within a group: the share of odd tokens."""
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]
