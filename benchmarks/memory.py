"""The memory that `llmrl check` foresees beside the memory that training takes. One JSON line a case.

    python benchmarks/memory.py [--only NAME ...]

Every case trains two steps in a process of its own. On the CPU the peak is that of resident memory over what the process held before the
model was loaded and after a step of a tiny one, with an allocator that gives back what is freed; with CUDA it is torch's own
count. Checkpoints are not counted: the clock stops, so to speak, with the last step.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure  # first: fixes the threads

SIZES = {  # hidden, intermediate, layers, heads, vocabulary
    "tiny": (64, 128, 2, 2, 8192),
    "5M": (256, 704, 4, 4, 8192),
    "22M": (512, 1408, 6, 8, 8192),
    "58M": (768, 2048, 8, 12, 8192),
    "21M-bigvocab": (256, 704, 4, 4, 69_632),
}
BF16: dict[str, Any] = {"mixed_precision": "bf16"}
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    # name: kind, size, tokens a microbatch, further keys of the recipe
    "sft-5M": ("sft", "5M", 2048, {}),
    "sft-5M-bf16": ("sft", "5M", 1024, BF16),
    "sft-22M": ("sft", "22M", 1024, {}),
    "sft-22M-checkpointed": ("sft", "22M", 2048, {"gradient_checkpointing": True}),
    "sft-22M-bf16": ("sft", "22M", 512, BF16),
    "sft-22M-bf16-checkpointed": ("sft", "22M", 512, {**BF16, "gradient_checkpointing": True}),
    "sft-22M-weights-bf16": ("sft", "22M", 512, {"dtype": "bfloat16"}),
    "sft-22M-lora": ("sft", "22M", 1024, {"lora": {"r": 16}}),
    "sft-22M-lora-bf16": ("sft", "22M", 512, {**BF16, "lora": {"r": 16}}),
    "sft-58M": ("sft", "58M", 512, {}),
    "sft-58M-checkpointed": ("sft", "58M", 512, {"gradient_checkpointing": True}),
    "sft-21M-bigvocab": ("sft", "21M-bigvocab", 1024, {}),
    "grpo-5M": ("grpo", "5M", 2048, {}),
    "grpo-22M": ("grpo", "22M", 1024, {}),
    "grpo-22M-checkpointed": ("grpo", "22M", 1024, {"gradient_checkpointing": True}),
    "grpo-22M-bf16": ("grpo", "22M", 512, BF16),
    "grpo-22M-lora": ("grpo", "22M", 1024, {"lora": {"r": 16}}),
    "grpo-58M": ("grpo", "58M", 512, {}),
    "grpo-21M-bigvocab": ("grpo", "21M-bigvocab", 1024, {}),
}
OPTIONAL = {  # where bitsandbytes is installed
    "sft-22M-adamw8bit": ("sft", "22M", 1024, {"optimizer": "adamw_8bit"}),
    "sft-22M-nf4": ("sft", "22M", 1024, {"lora": {"r": 16}, "quantization": "nf4"}),
    "sft-22M-int8": ("sft", "22M", 1024, {"lora": {"r": 16}, "quantization": "int8"}),
}
PROMPT, COMPLETION, ROW = 32, 96, 512
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # a case's name and the folder of the models
    args = parser.parse_args()
    cases = CASES | (OPTIONAL if _has_bitsandbytes() else {})
    if args.case:
        measure_case(Path(args.case[1]), args.case[0], *cases[args.case[0]])
        return
    names = args.only or list(cases)
    with tempfile.TemporaryDirectory() as folder:
        for size in {"tiny"} | {cases[name][1] for name in names}:
            save_model(Path(folder), size)
        for name in names:
            command = [sys.executable, __file__, "--case", name, folder]
            out = subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True)
            if out.returncode:
                raise SystemExit(f"{name} failed:\n{out.stderr[-3000:]}")
            print(next(line for line in out.stdout.splitlines() if line.startswith("{")), flush=True)


def _has_bitsandbytes() -> bool:
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None


def measure_case(models: Path, name: str, kind: str, size: str, tokens: int, keys: dict[str, Any]) -> None:
    """Trains the tiny model, then the case's, and prints what was foreseen and what was taken, in MB."""
    with tempfile.TemporaryDirectory() as out:
        # Libraries make buffers and compile kernels at first use; a tiny run of the same kind takes these out of the count.
        train(kind, models / "tiny", Path(out, "tiny"), tokens, keys, Peak())
        peak = Peak()
        estimate = train(kind, models / size, Path(out, "run"), tokens, keys, peak)
    measured, foreseen = peak.megabytes, estimate.peak / 2**20
    line = {
        "case": name, "foreseen_mb": round(foreseen, 1), "measured_mb": round(measured, 1), "ratio": round(foreseen / measured, 3),
        "terms": {t.name: round(t.bytes / 2**20, 1) for t in estimate.terms},
    }  # fmt: skip
    print(json.dumps(line))


class Peak:
    """Callback: the highest memory from its making to the end of the last step."""

    def __init__(self) -> None:
        import torch

        gc.collect()
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            self.base = measure.memory_mb()
        self.megabytes = 0.0

    def on_step_end(self, trainer: Any, step: int, metrics: Any) -> None:
        import torch

        now = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else measure.memory_mb(peak=True)
        self.megabytes = now - self.base


def save_model(folder: Path, size: str) -> None:
    """A random Qwen 2 model of this size with the benches' tokenizer."""
    import assets
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / size)
    AutoTokenizer.from_pretrained(assets.build() / "tokenizer").save_pretrained(folder / size)


def train(kind: str, model: Path, out: Path, tokens: int, keys: dict[str, Any], peak: Peak) -> Any:
    """Two steps of two microbatches each; returns the estimate for this recipe."""
    import numpy as np

    from llmrl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    from llmrl.types import Example

    common: dict[str, Any] = {
        "model_name_or_path": str(model), "output_dir": str(out), "tokens_per_microbatch": tokens, "max_steps": 2, "num_samples_logged": 0,
        **keys,
    }  # fmt: skip
    if kind == "sft":
        rng, rows = np.random.default_rng(0), 2 * tokens // ROW
        config: Any = SFTConfig(batch_size=rows, **common)
        supervised = np.arange(ROW) >= ROW // 8
        examples = [Example(rng.integers(0, 500, ROW, dtype=np.int32), supervised, i) for i in range(2 * rows)]
        lengths = [ROW] * len(examples)
        trainer: Any = SFTTrainer(config, train_dataset=examples, callbacks=[peak])
    else:
        completions = 2 * tokens // (PROMPT + COMPLETION)
        config = GRPOConfig(batch_size=completions // 8, max_completion_length=COMPLETION, **common)
        prompts = [{"prompt": f"{i} " + "a b c d " * 4} for i in range(64)]
        trainer = GRPOTrainer(config, train_dataset=prompts, reward_funcs=[_length], callbacks=[peak])
        lengths = [len(trainer.tokenizer(row["prompt"])["input_ids"]) for row in prompts]
    estimate = foresee(config, lengths)
    trainer.train()
    return estimate


def _length(completions: list[str], **columns: object) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def foresee(config: Any, lengths: list[int]) -> Any:
    """What `llmrl check` prints, for rows of these lengths."""
    from llmrl.cli.check import memory_of
    from llmrl.cli.plan import solve
    from llmrl.models.load import load_skeleton
    from llmrl.models.shape import shape_of

    shape = shape_of(load_skeleton(config)[0])
    return memory_of(config, solve(config, lengths), shape)


if __name__ == "__main__":
    main()
