"""A training run that a test may kill: `python resume_worker.py sft|grpo MODEL OUT KILL_AT` (0: never)."""

from __future__ import annotations

import os
import signal
import sys

import torch

from llmrl.algorithms.grpo import GRPOTrainer
from llmrl.algorithms.sft import SFTTrainer
from llmrl.config.grpo import GRPOConfig
from llmrl.config.sft import SFTConfig


class KillAt:
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def count_letters(completions, **kwargs):
    return [sum("a" <= x <= "z" for x in c) for c in completions]


def main(kind, model, out, kill_at):
    torch.set_num_threads(1)
    common = {
        "model_name_or_path": model, "output_dir": out, "batch_size": 4, "max_steps": 10, "save_steps": 5,
        "learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1,
    }  # fmt: skip
    callbacks = [KillAt(int(kill_at))]
    if kind == "sft":
        rows = [{"prompt": f"the answer to {i}", "completion": f" is {i * 7 % 10}"} for i in range(11)]
        lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}  # dropout: the generators' state must come back too
        SFTTrainer(SFTConfig(**common, lora=lora), train_dataset=rows, callbacks=callbacks).train()
    else:
        rows = [{"prompt": text} for text in ("the answer", "is", "because", "three", "times", "four", "twelve")]
        config = GRPOConfig(
            **common,
            num_generations=4,
            max_completion_length=8,
            num_iterations=2,
            group_filter="drop_zero_std",
            max_refills=1,
        )
        GRPOTrainer(config, train_dataset=rows, reward_funcs=count_letters, callbacks=callbacks).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
