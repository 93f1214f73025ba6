"""The forms that a run may take: adapters, bf16, checkpointed activations, several rewards, refused settings."""

from __future__ import annotations

import json

import pytest

from llmrl.algorithms.grpo import GRPOTrainer
from llmrl.algorithms.sft import SFTTrainer
from llmrl.config.grpo import GRPOConfig
from llmrl.config.sft import SFTConfig
from llmrl.errors import ConfigError, DivergenceError, RewardError

ROWS = [{"prompt": text, "answer": str(i)} for i, text in enumerate(("the answer", "is", "because", "three"))]


def count_letters(completions, **kwargs):
    return [float(sum("a" <= x <= "z" for x in c)) for c in completions]


def grpo(model, out, reward_funcs=count_letters, **settings):
    defaults = {"batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 3, "learning_rate": 1e-3}
    config = GRPOConfig(model_name_or_path=str(model), output_dir=str(out), **{**defaults, **settings})
    trainer = GRPOTrainer(config, train_dataset=ROWS, reward_funcs=reward_funcs)
    trainer.train()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_lora_takes_the_adapter_off_for_the_reference(tiny_model_dir, tmp_path):
    lines = grpo(tiny_model_dir, tmp_path, lora={"r": 4, "lora_alpha": 16}, learning_rate=3e-2)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6) and lines[-1]["kl"] > 1e-6
    saved = {p.name for p in (tmp_path / "model").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


@pytest.mark.parametrize(
    "settings", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}]
)
def test_precision_and_memory_settings_train(settings, tiny_model_dir, tmp_path):
    lines = grpo(tiny_model_dir, tmp_path, **settings)
    assert len(lines) == 3 and all(line["grad_norm"] > 0 for line in lines)
    gap = max(line["sampling/sampling_logp_difference/mean"] for line in lines)
    assert gap < (0.1 if "bf16" in settings.values() or "bfloat16" in settings.values() else 1e-4)


def test_gradient_checkpointing_changes_no_number(tiny_model_dir, tmp_path):
    plain, checkpointed = (
        grpo(tiny_model_dir, tmp_path / "a"),
        grpo(tiny_model_dir, tmp_path / "b", gradient_checkpointing=True),
    )
    for a, b in zip(plain, checkpointed):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-5
        )


def test_rewards_of_every_kind_together(tiny_model_dir, tmp_path):
    async def later(completions, answer, **kwargs):
        return [None if a == "0" else 0.5 for a in answer]

    overlong = {"function": "soft_overlong", "args": {"max_completion_len": 8, "soft_punish_cache": 4}, "weight": 2.0}
    lines = grpo(tiny_model_dir, tmp_path, [count_letters, later], rewards=[overlong])
    names = {name.split("/")[1] for name in lines[0] if name.startswith("rewards/")}
    assert {"count_letters", "later", "soft_overlong"} <= names
    assert lines[0]["rewards/later/mean"] == 0.5 and lines[0]["reward_outcomes/later/not-applicable"] == 4


def test_a_broken_reward_stops_with_its_name(tiny_model_dir, tmp_path):
    def broken(completions, **kwargs):
        raise ValueError("no such column")

    with pytest.raises(RewardError, match="broken"):
        grpo(tiny_model_dir, tmp_path, broken)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_a_sampler_that_disagrees_stops_the_run(tiny_model_dir, tmp_path, monkeypatch):
    from llmrl.rollout.local import LocalEngine

    original = LocalEngine._rollouts

    def lie(self, groups):
        for group in groups:
            for row in group:
                row.logprobs = [x - 0.5 for x in row.logprobs]
        return original(self, groups)

    monkeypatch.setattr(LocalEngine, "_rollouts", lie)
    with pytest.raises(DivergenceError, match="another temperature"):
        grpo(tiny_model_dir, tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": 0.9}, "top_p"),
        ({"temperature": 0}, "temperature 0"),
        ({"num_generations": 1}, "at least 2"),
        ({"preset": "grop"}, "dr_grpo"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        GRPOConfig(model_name_or_path="m", output_dir=str(tmp_path), **settings)


def test_what_is_missing_is_named(tiny_model_dir, tmp_path):
    config = GRPOConfig(model_name_or_path=str(tiny_model_dir), output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="needs a reward"):
        GRPOTrainer(config, train_dataset=ROWS)
    with pytest.raises(ConfigError, match="no prompts"):
        GRPOTrainer(config, reward_funcs=count_letters)
    sft = SFTConfig(model_name_or_path=str(tiny_model_dir), output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="no training rows"):
        SFTTrainer(sft)
    with pytest.raises(ConfigError, match="SFT has no rewards"):
        SFTTrainer(sft, train_dataset=ROWS, reward_funcs=count_letters)
    long = config.model_copy(update={"max_completion_length": 4096})
    with pytest.raises(ConfigError, match="leaves no room"):
        GRPOTrainer(long, train_dataset=ROWS, reward_funcs=count_letters)
