"""Reward-model runs in processes of their own: `reward_worker.py resume MODEL OUT KILL_AT` or `reward_worker.py gradient|one_pair MODEL OUT FILE`."""

from __future__ import annotations

import sys

import numpy as np
import torch

from llmrl.algorithms.reward_model import RewardTrainer
from llmrl.config.reward_model import RewardConfig
from tests.algorithms.recorded import gradients_of_update
from tests.algorithms.resume_worker import KillAt
from tests.algorithms.test_reward_invariance import reward_trainer


def resume(model, out, kill_at):
    rows = [
        {"prompt": f"the answer to {i}", "chosen": f" is {i * 7 % 10}", "rejected": " because" * (i % 3 + 1)}
        for i in range(11)
    ]
    config = RewardConfig(
        model_name_or_path=model, output_dir=out, batch_size=4, updates_per_step=2, max_steps=10, save_steps=5, eval_steps=2,
        learning_rate=1e-3, warmup_steps=2, weight_decay=0.1, lora={"r": 4, "lora_dropout": 0.2},
    )  # fmt: skip
    RewardTrainer(config, train_dataset=rows, eval_dataset=rows[:3], callbacks=[KillAt(int(kill_at))]).train()


def gradient(model, out, file, units=None):
    trainer = reward_trainer(model, out, tokens_per_microbatch=60, center_rewards_coefficient=0.01)
    examples = trainer.examples[: units and 2 * units]
    metrics = {}
    (gradients,) = gradients_of_update(trainer, lambda: metrics.update(trainer.update(examples)))
    metrics |= trainer.evaluate()
    if trainer.backend.is_main:
        named = {f"metric/{name}": value for name, value in metrics.items()}
        np.savez(file, **gradients, **named, world_size=trainer.backend.world_size)


def main(case, *rest):
    torch.set_num_threads(1)
    if case == "resume":
        resume(*rest)
    else:
        gradient(*rest, units=1 if case == "one_pair" else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
