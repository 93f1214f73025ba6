"""One process of `test_two_processes.py`: computes its share of an update and lets rank 0 write the gradients."""

from __future__ import annotations

import sys

import numpy as np
import torch

from tests.algorithms.recorded import experience_of, gradients_of_update, recorded_groups
from tests.algorithms.test_invariance import grpo_trainer, load, sft_examples


def sft(path, out):
    from llmrl.algorithms.sft import SFTTrainer
    from llmrl.config.sft import SFTConfig

    examples = sft_examples()
    model, tokenizer = load(path, torch.float64)
    config = SFTConfig(
        model_name_or_path=path, output_dir=out, batch_size=len(examples), max_steps=1, max_grad_norm=0.0,
        tokens_per_microbatch=50,
    )  # fmt: skip
    trainer = SFTTrainer(config, model=model, tokenizer=tokenizer, train_dataset=examples)
    return trainer, lambda: trainer.update(examples)


def grpo(path, out):
    settings = {"scale_rewards": "batch", "num_iterations": 2, "top_entropy_quantile": 0.5, "tokens_per_microbatch": 50}
    trainer = grpo_trainer(path, out, **settings)
    experience = experience_of(recorded_groups(), trainer.backend.rank, trainer.backend.world_size)
    return trainer, lambda: trainer.update(experience)


def one_group(path, out):
    """All the work is the first process's: the other runs empty microbatches."""
    trainer = grpo_trainer(path, out, num_iterations=2, tokens_per_microbatch=30)
    experience = experience_of(recorded_groups(1), trainer.backend.rank, trainer.backend.world_size)
    return trainer, lambda: trainer.update(experience)


def main(case, path, out, file):
    torch.set_num_threads(1)
    trainer, update = {"sft": sft, "grpo": grpo, "one_group": one_group}[case](path, out)
    metrics = {}

    def run():
        metrics.update(update())

    steps = gradients_of_update(trainer, run)
    if trainer.backend.is_main:
        arrays = {f"{i}/{n}": g for i, step in enumerate(steps) for n, g in step.items()}
        np.savez(file, **arrays, loss=metrics["loss"], world_size=trainer.backend.world_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
