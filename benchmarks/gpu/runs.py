"""Trainers from recipe to the last step: the same losses whatever may not matter, FSDP2 on one device among it, and every trainer once.

`python -m gpu.runs`: what `same_numbers` compares, in a process of its own, which the environment tells how to lay out parameters.
"""

from __future__ import annotations

import json
import math
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu.common import (
    REHEARSAL,
    SHAPES,
    check,
    emit,
    examples,
    lacks,
    lengths_of,
    make_model,
    make_tokenizer,
    result_of,
)

SHAPE, LAYERS, UPDATES = SHAPES["0.5B"], 2 if REHEARSAL else 4, 3
LOSS, NORM = 5e-3, 0.03
"""Relative bounds of a loss and of a gradient norm in bfloat16; float32's are 1e-5 and 1e-4. Each of AdamW's first updates is about the
sign of a gradient, so that where bfloat16 turns a sign, the next loss moves by more than rounding."""
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@check
def same_numbers() -> None:
    """Losses and gradient norms of three SFT updates, cut in other ways, with activations in host memory, with parameters sharded by
    FSDP2 over one process; and two GRPO steps so sharded, whose samples must come from the weights that are trained."""
    if lacks("same_numbers"):
        return
    base = sft_numbers()
    exact = sft_numbers(mixed_precision="no")
    _compare("float32", base, exact)
    _compare("float32/microbatches", sft_numbers(mixed_precision="no", tokens_per_microbatch=256), exact, 1e-5, 1e-4)
    _compare("microbatches", sft_numbers(tokens_per_microbatch=256), base)
    _compare("activation_offloading", sft_numbers(activation_offloading=True), base)
    alone, sharded = apart({}), apart(FSDP2)
    _compare("another_process", alone, base)
    _compare("fsdp2", sharded, alone)
    gap = sharded["logprob_gap"]
    emit("same_numbers/fsdp2/grpo", gap < 0.05, logprob_gap=gap, alone=alone["logprob_gap"], bound=0.05)


def sft_numbers(**keys: Any) -> dict[str, Any]:
    """Losses and gradient norms of three updates on the same rows; `keys` are a recipe's."""
    from llmrl import SFTConfig, SFTTrainer

    rows = examples(lengths_of(16, 20, 60 if REHEARSAL else 300), SHAPE.vocabulary)
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(**recipe(out, batch_size=len(rows), learning_rate=1e-3) | keys)
        trainer = SFTTrainer(config, train_dataset=rows, **model_and_tokenizer())
        updates = [trainer.update(trainer.examples) for _ in range(UPDATES)]
    return {"losses": [u["loss"] for u in updates], "norms": [u["grad_norm"] for u in updates]}


def grpo_gap() -> float:
    """Mean |sampled - recomputed| log-prob of the second of two GRPO steps, in nats."""
    from gpu.speed import odd_share, words

    from llmrl import GRPOConfig, GRPOTrainer

    prompts = [{"prompt": words(20, i, SHAPE.vocabulary)} for i in range(8)]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            batch_size=4,
            num_generations=4,
            max_completion_length=16,
            max_logprob_gap=1e3,
            **recipe(out, learning_rate=1e-4),
        )
        trainer = GRPOTrainer(config, train_dataset=prompts, reward_funcs=odd_share, **model_and_tokenizer())
        with trainer.rollouts:
            metrics = [trainer.update(trainer.rollouts.collect(step)) for step in (1, 2)]
    return metrics[-1]["sampling/sampling_logp_difference/mean"]


def recipe(out: str, **keys: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": "a shape from its configuration", "output_dir": out, "mixed_precision": "bf16", "max_steps": UPDATES,
        "tokens_per_microbatch": 8192, "num_samples_logged": 0, "lr_scheduler_type": "constant", **keys,
    }  # fmt: skip


def model_and_tokenizer() -> dict[str, Any]:
    return {"model": make_model(SHAPE, layers=LAYERS), "tokenizer": make_tokenizer(SHAPE.vocabulary)}


def apart(sharding: dict[str, str]) -> dict[str, Any]:
    """`sft_numbers` and `grpo_gap` of a process that a launcher with this sharding might have started."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return result_of("runs", **launched, **sharding)


def _compare(name: str, got: dict[str, Any], base: dict[str, Any], loss: float = LOSS, norm: float = NORM) -> None:
    gaps = {
        key: max(abs(a - b) / abs(b) for a, b in zip(got[key], base[key], strict=True)) for key in ("losses", "norms")
    }
    ok = gaps["losses"] < loss and gaps["norms"] < norm
    emit(f"same_numbers/{name}", ok, **gaps, loss_bound=loss, norm_bound=norm, last_loss=got["losses"][-1])


@check
def trainers() -> None:
    """Every trainer for a few steps in bfloat16 autocast, from a model on the disk: losses are finite or fall, the log-prob gap is small."""
    if lacks("trainers"):
        return
    from llmrl import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        PPOConfig,
        PPOTrainer,
        RewardConfig,
        RewardTrainer,
        SFTConfig,
        SFTTrainer,
    )
    from llmrl.models.init import init_model

    rows = [{"prompt": f"{i} plus {i + 1} is ", "completion": f"{2 * i + 1}."} for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        texts = [r["prompt"] + r["completion"] for r in rows]
        sizes = {"hidden_size": 64, "num_layers": 2} if REHEARSAL else {}
        start = init_model(Path(folder) / "init", texts=texts, vocab_size=300, seed=0, **sizes)
        common = {"mixed_precision": "bf16", "lr_scheduler_type": "constant", "num_samples_logged": 0}
        sft = SFTConfig(
            model_name_or_path=str(start),
            output_dir=f"{folder}/sft",
            batch_size=16,
            max_steps=30,
            learning_rate=1e-3,
            **common,
        )
        _falls("sft", SFTTrainer, sft, rows)
        trained = f"{folder}/sft/model"
        pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "I will not say."} for r in rows]
        for kind, config_class, trainer_class in (
            ("reward", RewardConfig, RewardTrainer),
            ("dpo", DPOConfig, DPOTrainer),
        ):
            config = config_class(
                model_name_or_path=trained,
                output_dir=f"{folder}/{kind}",
                batch_size=16,
                max_steps=20,
                learning_rate=1e-3,
                **common,
            )
            _falls(kind, trainer_class, config, pairs)
        sampled = {
            "model_name_or_path": trained, "batch_size": 8, "num_generations": 8, "max_steps": 3, "max_completion_length": 32,
            "learning_rate": 1e-5, **common,
        }  # fmt: skip
        prompts = [{"prompt": r["prompt"]} for r in rows]
        _samples("grpo", GRPOTrainer, GRPOConfig(output_dir=f"{folder}/grpo", **sampled), prompts)
        for critic in ("shared", "separate"):
            ppo = PPOConfig(output_dir=f"{folder}/ppo-{critic}", critic=critic, **sampled)
            _samples(f"ppo-{critic}", PPOTrainer, ppo, prompts)


class Losses:
    """A callback that keeps what every step logged."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)


def _falls(kind: str, trainer_class: Any, config: Any, rows: list[dict[str, str]]) -> None:
    logged = Losses()
    trainer_class(config, train_dataset=rows, callbacks=[logged]).train()
    first, last = logged.metrics[0]["loss"], logged.metrics[-1]["loss"]
    emit(f"trainers/{kind}", last < first, first_loss=first, last_loss=last)


def _samples(kind: str, trainer_class: Any, config: Any, prompts: list[dict[str, str]]) -> None:
    logged = Losses()
    trainer_class(config, train_dataset=prompts, reward_funcs=_digits, callbacks=[logged]).train()
    last = logged.metrics[-1]
    gap = last["sampling/sampling_logp_difference/mean"]
    emit(f"trainers/{kind}", math.isfinite(last["loss"]) and gap < 0.1, logprob_gap=gap, bound=0.1)


def _digits(completions: list[str], **_: object) -> list[float]:
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def main() -> None:
    torch.manual_seed(0)
    numbers = sft_numbers()
    print("RESULT " + json.dumps({**numbers, "logprob_gap": grpo_gap()}), flush=True)


if __name__ == "__main__":
    main()
