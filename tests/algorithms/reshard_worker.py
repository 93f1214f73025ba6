"""A run that is continued under another way of laying its parameters out: `reshard_worker.py STRATEGY KIND MODEL OUT STEPS [FROM]`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tests.algorithms.resume_worker import count_letters
from tests.algorithms.sharding_worker import ENVIRONMENTS


def main(strategy: str, kind: str, model: str, out: str, steps: str, start: str = "auto") -> None:
    torch.set_num_threads(1)
    os.environ.update(ENVIRONMENTS[strategy])
    from llmrl import DPOConfig, DPOTrainer, PPOConfig, PPOTrainer, SFTConfig, SFTTrainer

    common = {
        "model_name_or_path": model, "output_dir": out, "batch_size": 5, "max_steps": int(steps), "save_steps": 3,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "tokens_per_microbatch": 60, "resume": start,
    }  # fmt: skip
    if kind == "sft":
        rows = [{"prompt": f"the answer to {i}", "completion": f" is {i * 7 % 10} " * (1 + i % 5)} for i in range(23)]
        trainer = SFTTrainer(SFTConfig(**common, lora={"r": 4, "modules_to_save": ["lm_head"]}), train_dataset=rows)
    elif kind == "dpo":  # a reference that moves is in the checkpoint
        rows = [
            {"prompt": f"the {i}", "chosen": " is" * (1 + i % 4), "rejected": " four" * (1 + i % 3)} for i in range(13)
        ]
        trainer = DPOTrainer(DPOConfig(**common, sync_ref_model=True, ref_model_sync_steps=2), train_dataset=rows)
    else:  # a critic too, and a controller
        rows = [{"prompt": text} for text in ("the answer", "is", "because", "three", "times", "four", "twelve")]
        config = PPOConfig(
            **common, num_generations=2, max_completion_length=8, critic="separate", critic_warmup_steps=1,
            kl_controller="adaptive", kl_target=0.1,
        )  # fmt: skip
        trainer = PPOTrainer(config, train_dataset=rows, reward_funcs=count_letters)
    trainer.train()
    if trainer.backend.is_main:
        lines = Path(out, "metrics.jsonl").read_text().splitlines()
        found = [[row["loss"], row["grad_norm"]] for row in map(json.loads, lines)]
        Path(out, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
