"""One process of `test_sharding.py`: every trainer, five updates, under one way of laying the parameters out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from llmrl.data.packing import empty_example
from tests.algorithms.pairs import random_pairs
from tests.algorithms.recorded import experience_of, recorded_groups
from tests.algorithms.test_invariance import no_reward, sft_examples

ENVIRONMENTS = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "fsdp2-lean": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "false",
    },
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "zero2-offload": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    },
}  # fmt: skip
UPDATES = 5
KINDS = ("sft", "reward", "dpo", "ppo", "ppo_separate", "grpo", "grpo_lora")


def trainer_of(kind: str, path: str, out: str, budget: int):
    """(trainer, one update)"""
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
    )  # fmt: skip

    base, _, variant = kind.partition("_")
    common = {
        "model_name_or_path": path, "output_dir": f"{out}/{kind}", "max_steps": UPDATES, "learning_rate": 1e-3,
        "tokens_per_microbatch": budget, "max_grad_norm": 0.5, "weight_decay": 0.1, "seed": 3,
    }  # fmt: skip
    rollouts = {"num_generations": 4, "max_completion_length": 30, "beta": 0.1, "max_logprob_gap": 1e9}
    prompts = {"train_dataset": [{"prompt": "the answer is"}], "reward_funcs": no_reward}
    if base == "sft":
        examples = sft_examples()
        trainer = SFTTrainer(SFTConfig(**common, batch_size=len(examples)), train_dataset=examples)
        return trainer, lambda step: trainer.update(examples)
    if base in ("reward", "dpo"):
        pairs = random_pairs()
        made = (RewardTrainer, RewardConfig) if base == "reward" else (DPOTrainer, DPOConfig)
        trainer = made[0](made[1](**common, batch_size=9), train_dataset=pairs)
        rows = trainer.examples  # with the reference's log-probs, for DPO
        return trainer, lambda step: trainer.update(rows)
    if base == "ppo":
        config = PPOConfig(**common, **rollouts, critic=variant or "shared", critic_warmup_steps=1)
        trainer = PPOTrainer(config, **prompts)
    else:
        lora = {"r": 4, "lora_alpha": 8} if variant == "lora" else None
        config = GRPOConfig(**common, **rollouts, num_iterations=2, lora=lora)
        trainer = GRPOTrainer(config, **prompts)
    backend = trainer.backend

    def update(step: int):
        experience = experience_of(recorded_groups(seed=step), backend.rank, backend.world_size)
        return trainer.update(type(experience)(step + 1, experience.groups))

    return trainer, update


def spoil(trainer) -> None:
    backend = trainer.backend
    batches = trainer.microbatches(trainer.share(trainer._weighted(trainer.examples)))

    def loss(module, batch):
        value, stats = trainer._loss(module, batch)
        return value * (float("nan") if backend.rank == backend.world_size - 1 else 1.0), stats

    assert backend.update(batches, loss, lambda: [empty_example(["weights"])]).skipped


def main(strategy: str, path: str, out: str, budget: str, *kinds: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for kind in kinds or KINDS:
        os.environ.update(ENVIRONMENTS[strategy])
        trainer, update = trainer_of(kind, path, out, int(budget))
        rows = [update(step) for step in range(UPDATES)]
        if kind == "sft":  # an update that is not finite on one process leaves everything as it was, on all
            spoil(trainer)
            rows.append(update(UPDATES))
        found[kind] = [[row["loss"], row["grad_norm"]] for row in rows]
        trainer.save_model(Path(out, kind, "saved"))
        found[f"{kind} strategy"] = [trainer.backend.strategy.name, trainer.backend.world_size]
        if trainer.backend.is_main:
            sizes = [p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.module.parameters()]
            found[f"{kind} parameters here"] = int(np.sum(sizes))
        trainer.backend.barrier()
        if hasattr(trainer, "rollouts") and trainer.rollouts is not None:
            trainer.rollouts.close()
    if trainer.backend.is_main:
        Path(out, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
