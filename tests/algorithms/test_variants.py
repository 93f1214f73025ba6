"""The forms that a run may take: adapters, bf16, checkpointed activations, several rewards, refused settings."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from llmrl.algorithms.grpo import GRPOTrainer
from llmrl.algorithms.sft import SFTTrainer
from llmrl.config.grpo import GRPOConfig
from llmrl.config.sft import SFTConfig
from llmrl.errors import ConfigError, DivergenceError, RewardError
from llmrl.experience.batch import merge_update_metrics

ROWS = [{"prompt": text, "answer": str(i)} for i, text in enumerate(("the answer", "is", "because", "three"))]


def count_letters(completions, **kwargs):
    return [float(sum("a" <= x <= "z" for x in c)) for c in completions]


def grpo(model, out, reward_funcs=count_letters, eval_dataset=None, **settings):
    defaults = {
        "batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "learning_rate": 1e-3,
    }
    config = GRPOConfig(model_name_or_path=str(model), output_dir=str(out), **{**defaults, **settings})
    trainer = GRPOTrainer(config, train_dataset=ROWS, eval_dataset=eval_dataset, reward_funcs=reward_funcs)
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


def test_a_model_that_was_handed_in_in_bf16_has_no_float32_bound(tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    config = GRPOConfig(model_name_or_path="handed in", output_dir=str(tmp_path), max_steps=2, max_completion_length=8)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = GRPOTrainer(config, model=model, tokenizer=tokenizer, train_dataset=ROWS, reward_funcs=count_letters)
    assert trainer.train()["status"] == "finished"


def test_evaluation_changes_no_weight_and_rewards_see_the_step(tiny_model_dir, tmp_path):
    steps = []

    def letters(completions, trainer_state, **kwargs):
        steps.append(trainer_state.global_step)
        return count_letters(completions)

    settings = {"eval_steps": 1, "eval_fraction": 0.0, "eval_temperature": 1.0, "eval_num_generations": 2}
    plain = grpo(tiny_model_dir, tmp_path / "a", letters)
    assert steps == [1, 2, 3]
    evaluated = grpo(tiny_model_dir, tmp_path / "b", letters, eval_dataset=ROWS[:2], **settings)
    assert steps[3:] == [1, 1, 2, 2, 3, 3] and all("eval_reward" in line for line in evaluated)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("a", "b"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert [line["reward"] for line in plain] == [line["reward"] for line in evaluated]


def test_a_bad_gold_of_the_evaluation_data_is_found_before_the_first_step(tiny_model_dir, tmp_path, caplog):
    rows = [{"prompt": "good", "answer": "3"}, {"prompt": "bad", "answer": " ", "id": "the bad one"}]
    grpo(tiny_model_dir, tmp_path, None, rewards="math_answer", eval_dataset=rows, max_steps=1)
    assert "the bad one" in caplog.text


def test_entropy_selection_leaves_statistics_over_all_tokens(tiny_model_dir, tmp_path):
    everything, few = (grpo(tiny_model_dir, tmp_path / str(q), top_entropy_quantile=q, max_steps=1) for q in (1.0, 0.2))
    for name in ("entropy", "importance_ratio", "sampling/importance_sampling_ratio/mean"):
        assert few[0][name] == pytest.approx(everything[0][name], rel=1e-5), name
    assert 0 < few[0]["grad_norm"] != everything[0]["grad_norm"]


def test_metrics_are_of_all_updates_of_a_step():
    updates = [
        {"loss": 1.0, "x/min": 1.0, "x/max": 1.0, "learning_rate": 0.1},
        {},
        {"loss": 3.0, "x/min": 0.0, "x/max": 2.0, "learning_rate": 0.2},
    ]
    assert merge_update_metrics(updates) == {"loss": 2.0, "x/min": 0.0, "x/max": 2.0, "learning_rate": 0.2}
    assert merge_update_metrics([{}]) == {"loss": 0.0}


def test_rewards_of_dropped_groups_are_seen(tiny_model_dir, tmp_path, caplog):
    def solved(completions, **kwargs):
        return [1.0] * len(completions)

    lines = grpo(tiny_model_dir, tmp_path, solved, preset="dapo", max_refills=1, max_steps=1)
    assert lines[0]["reward"] == 1.0 and lines[0]["frac_reward_zero_std"] == 1.0
    assert lines[0]["groups/kept"] == 0 and lines[0]["groups/dropped"] == 8 and "no update" in caplog.text


def test_the_learning_rate_of_a_step_does_not_depend_on_dropped_ones(tiny_model_dir, tmp_path):
    def late(completions, trainer_state, **kwargs):
        return [0.0] * len(completions) if trainer_state.global_step < 3 else count_letters(completions)

    settings = {
        "preset": "dapo",
        "max_refills": 0,
        "updates_per_step": 2,
        "max_steps": 4,
        "lr_scheduler_type": "linear",
    }
    lines = grpo(tiny_model_dir, tmp_path / "a", late, **settings)
    usual = grpo(tiny_model_dir, tmp_path / "b", **settings)
    assert [line["loss"] for line in lines[:2]] == [0.0, 0.0]
    assert [line["learning_rate"] for line in lines[2:]] == [line["learning_rate"] for line in usual[2:]]


def test_an_adapter_that_is_continued_is_told_what_its_reference_is(tiny_model_dir, tmp_path, caplog):
    grpo(tiny_model_dir, tmp_path / "a", lora={"r": 4}, max_steps=1)
    assert "without its adapter" not in caplog.text
    grpo(tmp_path / "a" / "model", tmp_path / "b", max_steps=1)
    assert "without its adapter" in caplog.text


def test_a_broken_reward_stops_with_its_name(tiny_model_dir, tmp_path):
    def broken(completions, **kwargs):
        raise ValueError("no such column")

    with pytest.raises(RewardError, match="broken"):
        grpo(tiny_model_dir, tmp_path, broken)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_a_sampler_that_disagrees_stops_the_run(tiny_model_dir, tmp_path, monkeypatch):
    from llmrl.rollout.local import LocalEngine

    original = LocalEngine._rollouts

    def lie(self, group):
        for row in group:
            row.logprobs = [x - 0.5 for x in row.logprobs]
        return original(self, group)

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
