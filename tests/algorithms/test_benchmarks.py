"""Benchmarks while a model trains: read before the first step, the same numbers as `llmrl eval`, the best checkpoint by one of them."""

from __future__ import annotations

import json

import pytest

from llmrl.algorithms.dpo import DPOTrainer
from llmrl.algorithms.grpo import GRPOTrainer
from llmrl.algorithms.ppo import PPOTrainer
from llmrl.algorithms.reward_model import RewardTrainer
from llmrl.algorithms.sft import SFTTrainer
from llmrl.config.dpo import DPOConfig
from llmrl.config.grpo import GRPOConfig
from llmrl.config.ppo import PPOConfig
from llmrl.config.reward_model import RewardConfig
from llmrl.config.sft import SFTConfig
from llmrl.errors import ConfigError

SPEC = """\
title: The answer
data: {path: echo.jsonl}
prompts: {plain: {text: "{question}"}}
scorer: {function: text_match}
max_completion_length: 4
"""
ROWS = [{"prompt": f"the answer to {i}", "completion": f" is {i}"} for i in range(4)]
PAIRS = [{"prompt": f"the answer to {i}", "chosen": f" is {i}", "rejected": " is not"} for i in range(4)]


@pytest.fixture
def spec(tmp_path):
    """A benchmark whose answers the tests' model can learn by heart in a few steps."""
    rows = [{"id": f"e{i}", "question": f"the answer to {i}", "answer": f"is {i}"} for i in range(4)]
    (tmp_path / "echo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "echo.yaml"
    path.write_text(SPEC)
    return path


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def settings(model, out, spec, **more):
    return {
        "model_name_or_path": str(model), "output_dir": str(out), "benchmarks": [str(spec)], "batch_size": 4, "eval_steps": 2,
        **more,
    }  # fmt: skip


def test_a_model_that_learns_the_answers(tiny_model_dir, spec, tmp_path):
    """The numbers are those of `llmrl eval` on the model that was kept, and the best checkpoint is the one they name."""
    out = tmp_path / "run"
    recipe = settings(
        tiny_model_dir, out, spec, max_steps=30, eval_steps=10, learning_rate=3e-3, lr_scheduler_type="constant"
    )
    summary = SFTTrainer(SFTConfig(**recipe, metric_for_best_model="eval_echo/accuracy"), train_dataset=ROWS).train()
    seen = {row["step"]: row["eval_echo/accuracy"] for row in logged(out) if "eval_echo/accuracy" in row}
    assert sorted(seen) == [10, 20, 30] and max(seen.values()) == 1.0
    best = summary["best"]
    assert best["value"] == 1.0 and best["step"] == min(step for step, value in seen.items() if value == 1.0)
    results = json.loads((out / "evaluations" / f"step_{best['step']:08d}" / "echo.json").read_text())
    assert results["accuracy"] == 1.0 and len(results["per_row"]) == 4
    again = SFTTrainer(
        SFTConfig(
            **{
                **recipe,
                "output_dir": str(tmp_path / "again"),
                "model_name_or_path": f"{best['checkpoint']}/model",
                "max_steps": 1,
            }
        ),
        train_dataset=ROWS,
    )
    with again.benchmarks:
        assert again.benchmarks.evaluate(0)["eval_echo/accuracy"] == 1.0


@pytest.mark.parametrize("kind", ["dpo", "grpo", "ppo"])
def test_every_trainer_that_has_a_policy(kind, tiny_model_dir, spec, tmp_path):
    out = tmp_path / "run"
    recipe = settings(tiny_model_dir, out, spec, max_steps=2, learning_rate=0.0)
    if kind == "dpo":
        DPOTrainer(DPOConfig(**recipe), train_dataset=PAIRS).train()
    else:
        more = {"max_completion_length": 4, "rewards": ["exact_match"]}
        rows = [{"prompt": f"p{i}", "answer": "is 1"} for i in range(4)]
        if kind == "ppo":
            PPOTrainer(PPOConfig(**recipe, **more), train_dataset=rows).train()
        else:
            GRPOTrainer(GRPOConfig(**recipe, **more, num_generations=2), train_dataset=rows).train()
    last = logged(out)[-1]
    assert {"eval_echo/accuracy", "eval_echo/accuracy_low", "eval_echo/completions/mean_length"} <= set(last)
    assert (out / "evaluations" / "step_00000002" / "echo.json").is_file()


def test_a_part_of_a_benchmark_is_the_same_part_every_time(tiny_model_dir, spec, tmp_path):
    def ids(out):
        recipe = settings(tiny_model_dir, tmp_path / out, spec)
        recipe["benchmarks"] = [{"name": str(spec), "max_problems": 2, "n": 3}]
        trainer = SFTTrainer(SFTConfig(**recipe, seed=len(out)), train_dataset=ROWS)
        (task,) = trainer.benchmarks.tasks
        assert task.spec.n == 3 and task.spec.temperature == 1.0  # greedy ones would all be the same
        trainer.benchmarks.close()
        return [p.id for p in task.prompts]

    assert len(ids("a")) == 2 and ids("a2") == ids("b")


def test_what_is_wrong_is_said_before_the_first_step(tiny_model_dir, spec, tmp_path):
    def make(**more):
        SFTTrainer(SFTConfig(**settings(tiny_model_dir, tmp_path / "run", spec, **more)), train_dataset=ROWS)

    with pytest.raises(ConfigError, match="did you mean math500"):
        make(benchmarks="math50")
    with pytest.raises(ConfigError, match="stands twice"):
        make(benchmarks=[str(spec), {"name": str(spec), "n": 1}])
    with pytest.raises(ConfigError, match=r"max_completion_length 600 .* takes 512"):
        make(benchmarks=[{"name": str(spec), "max_completion_length": 600}])
    with pytest.raises(ConfigError, match="n=2 equal completions"):
        make(benchmarks=[{"name": str(spec), "n": 2, "temperature": 0.0}])
    spec.write_text(SPEC.replace("text_match", "code_tests"))
    with pytest.raises(ConfigError, match="allow_code_execution"):
        make()
    with pytest.raises(ConfigError, match="benchmarks"):
        RewardTrainer(RewardConfig(**settings(tiny_model_dir, tmp_path / "run", spec)), train_dataset=PAIRS)
