"""Every trainer with rank-stabilised and with weight-decomposed adapters: it learns, saves, and goes on bit for bit after a break."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from llmrl import DPOTrainer, GRPOTrainer, PPOTrainer, RewardTrainer, SFTTrainer
from llmrl.config.load import CONFIGS

TRAINERS = {"sft": SFTTrainer, "reward": RewardTrainer, "dpo": DPOTrainer, "ppo": PPOTrainer, "grpo": GRPOTrainer}
WORDS = ("the answer", "is", "because", "three")
PAIRS = [{"prompt": w, "chosen": " twelve" + " is" * i, "rejected": " no"} for i, w in enumerate(WORDS)]
ROWS = {
    "sft": [{"prompt": w, "completion": " twelve"} for w in WORDS],
    "reward": PAIRS,
    "dpo": PAIRS,
    "ppo": [{"prompt": w} for w in WORDS],
    "grpo": [{"prompt": w} for w in WORDS],
}
SAMPLED = {"num_generations": 2, "max_completion_length": 6}
KEYS = {"ppo": {**SAMPLED, "num_iterations": 1}, "grpo": SAMPLED}


class Broken(Exception):
    pass


class BreakAtSave:
    """A callback: the process is gone right after its first checkpoint."""

    def on_save(self, path):
        raise Broken


def letters(completions, **columns):
    return [float(sum("a" <= x <= "m" for x in text)) for text in completions]


def trainer(kind, model, out, lora, **settings):
    config = CONFIGS[kind](
        model_name_or_path=str(model), output_dir=str(out), batch_size=2, max_steps=3, learning_rate=1e-2, save_steps=2,
        lora={"r": 4, **lora}, **KEYS.get(kind, {}),
    )  # fmt: skip
    if "reward_funcs" not in settings and kind in ("ppo", "grpo"):
        settings["reward_funcs"] = letters
    return TRAINERS[kind](config, train_dataset=ROWS[kind], **settings)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{"use_rslora": True}, {"use_dora": True}], ids=["rslora", "dora"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_it_learns_saves_and_resumes(tiny_model_dir, tmp_path, kind, lora):
    whole = trainer(kind, tiny_model_dir, tmp_path / "whole", lora)
    before = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    whole.train()
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name  # adapters moved, nothing else did
    with pytest.raises(Broken):
        trainer(kind, tiny_model_dir, tmp_path / "parts", lora, callbacks=[BreakAtSave()]).train()
    trainer(kind, tiny_model_dir, tmp_path / "parts", lora).train()
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    saved = [load_file(tmp_path / run / "model" / "adapter_model.safetensors") for run in ("whole", "parts")]
    assert saved[0].keys() == saved[1].keys() and all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0])
    assert any("lora_magnitude_vector" in n for n in saved[0]) == ("use_dora" in lora)
    settings = json.loads((tmp_path / "whole" / "model" / "adapter_config.json").read_text())
    assert {key: settings[key] for key in lora} == lora
