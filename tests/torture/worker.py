"""The run that is tortured: eight tiny steps of SFT or GRPO, every other one saved, which write down where they stand."""

from __future__ import annotations

import os
import sys
from typing import Any

STEPS = 8
ROWS = [{"prompt": f"the answer to {i}", "completion": f" is {i * 7 % 10}"} for i in range(11)]
PROMPTS = [{"prompt": text} for text in ("the answer", "is", "because", "three", "times", "four", "twelve")]


def train(kind: str, launch: str, model: str, out: str, trace: str) -> None:
    """Trains in `out` and appends each place where this process stands to the file `trace`, followed by its rank."""
    from llmrl.errors import LLMRLError

    if launch == "fsdp2":  # what accelerate launch sets
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

    _write_places(f"{trace}{os.environ.get('RANK', '0')}")
    try:
        _trainer(kind, model, out).train()
    except LLMRLError as error:
        print(f"llmrl: error: {error}", file=sys.stderr)
        sys.exit(2)


def _trainer(kind: str, model: str, out: str) -> Any:
    from llmrl.algorithms.grpo import GRPOTrainer
    from llmrl.algorithms.sft import SFTTrainer
    from llmrl.config.grpo import GRPOConfig
    from llmrl.config.sft import SFTConfig

    common = {
        "model_name_or_path": model, "output_dir": out, "batch_size": 4, "max_steps": STEPS, "save_steps": 2,
        "learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1, "tokens_per_microbatch": 48,
    }  # fmt: skip
    if kind == "sft":
        lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}  # dropout: the generators' state must come back too
        return SFTTrainer(SFTConfig(**common, lora=lora), train_dataset=ROWS)
    config = GRPOConfig(**common, num_generations=4, max_completion_length=8, num_iterations=2)
    return GRPOTrainer(config, train_dataset=PROMPTS, reward_funcs=count_letters)


def count_letters(completions: list[str], **kwargs: Any) -> list[float]:
    _note("scoring")
    return [float(sum("a" <= x <= "z" for x in c)) for c in completions]


def _note(place: str) -> None:
    os.write(_trace, f"{place}\n".encode())


def _write_places(trace: str) -> None:
    global _trace
    from llmrl.train.standing import Standing

    _trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    real = Standing._note

    def note(self: Standing, place: str, replace: bool) -> None:
        real(self, place, replace)
        _note(self.places()[0][0])

    Standing._note = note  # type: ignore[method-assign]


_trace = 1
