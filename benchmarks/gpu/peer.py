"""What speed.py measures, by TRL through its public API: python -m gpu.peer sft|sft-bfd|dpo SIZE. Prints one RESULT line."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from datasets import Dataset
from gpu.common import REHEARSAL, SHAPES, Peak, Shape, make_model, make_tokenizer, synchronize
from gpu.speed import LONGEST, ROWS, STEPS, TOKENS, WARM, pair_rows, sft_rows
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
        synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    task, size = sys.argv[1:]
    clock, memory = Clock(), Peak()
    with tempfile.TemporaryDirectory() as out:
        trainer, per_step = make_trainer(task, SHAPES[size], out, clock)
        trainer.train()
    columns = ("input_ids",) if task != "dpo" else ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")
    timed = range(WARM * per_step, STEPS * per_step)
    rows = [trainer.train_dataset[i % len(trainer.train_dataset)] for i in timed]
    tokens = sum(len(row[name]) for row in rows for name in columns)
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    seconds = clock.ends[STEPS - 1] - clock.ends[WARM - 1]
    line = {
        "tokens": tokens, "tokens_per_second": round(tokens / seconds, 1), "peak_mb": round(memory.megabytes(), 1),
        "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip
    print("RESULT " + json.dumps(line), flush=True)


def make_trainer(task: str, shape: Shape, out: str, clock: Clock) -> tuple[Any, int]:
    """(trainer, rows or pairs of a step). A microbatch is as large as ours when every row is as long as the longest."""
    rows = ROWS if task == "sft" else ROWS // 2
    sequences = TOKENS // LONGEST // (2 if task == "dpo" else 1)
    common = {
        "output_dir": out, "per_device_train_batch_size": sequences, "gradient_accumulation_steps": rows // sequences,
        "max_steps": STEPS, "learning_rate": 1e-6, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1,
        "bf16": True, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "max_length": LONGEST, "use_cpu": REHEARSAL, "train_sampling_strategy": "sequential", "max_grad_norm": 1.0,
    }  # fmt: skip
    given = {
        "model": make_model(shape), "processing_class": make_tokenizer(shape.vocabulary), "callbacks": [clock],
    }  # fmt: skip
    if task == "dpo":
        given["ref_model"] = make_model(shape)
        return DPOTrainer(
            args=DPOConfig(**common), train_dataset=Dataset.from_list(pair_rows(shape.vocabulary)), **given
        ), rows
    packing = {"packing": True, "packing_strategy": "bfd"} if task == "sft-bfd" else {}
    config = SFTConfig(completion_only_loss=True, **packing, **common)
    return SFTTrainer(args=config, train_dataset=Dataset.from_list(sft_rows(shape.vocabulary)), **given), rows


if __name__ == "__main__":
    main()
