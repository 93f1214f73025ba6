"""Six optimizer steps of SFT equal the peer's trace: loss, gradient norm, learning rate and final weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmrl.algorithms.sft import SFTTrainer
from llmrl.config.sft import SFTConfig
from llmrl.types import Example
from tests.conftest import ORACLES


def load_oracle_model(name: str = "model"):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ORACLES / name, dtype=torch.float32)


@pytest.mark.parametrize("tokens_per_microbatch", [40, 100_000])
def test_training_trace_equals_the_peers(tmp_path, tiny_tokenizer, tokens_per_microbatch):
    oracle = json.loads((ORACLES / "sft_train_trace.json").read_text())
    case = oracle["cases"][0]
    examples = [
        Example(
            np.array(row["input_ids"], np.int32),
            np.array([False] + [label != -100 for label in row["labels"][1:]]),
            unit=i,
        )
        for i, row in enumerate(oracle["inputs"]["rows"])
    ]
    config = SFTConfig(
        model_name_or_path="oracle",
        output_dir=str(tmp_path),
        batch_size=4,
        tokens_per_microbatch=tokens_per_microbatch,
        shuffle=False,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=1.0,
    )
    trainer = SFTTrainer(config, model=load_oracle_model(), tokenizer=tiny_tokenizer, train_dataset=examples)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(case["history"]) == 6
    for ours, theirs in zip(lines, case["history"]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-9)
    for name, p in trainer.model.named_parameters():
        assert p.detach().norm().item() == pytest.approx(case["final_param_norms"][name], rel=1e-5, abs=1e-6)
