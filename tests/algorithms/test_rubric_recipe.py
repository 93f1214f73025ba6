"""Two steps of the shipped rubric recipe on a small model, with a scripted judge, and a hybrid reward in the same loop."""

from __future__ import annotations

import json

import pytest

from llmrl.algorithms.grpo import GRPOTrainer
from llmrl.config.grpo import GRPOConfig
from llmrl.config.load import load_recipe
from llmrl.models.init import init_model
from llmrl.rewards.rubric import load_rubric
from tests.rewards.scripted_judge import Answer, judge  # noqa: F401  (a fixture)

ROWS = [{"prompt": text, "answer": str(i)} for i, text in enumerate(("the answer", "is", "because", "three"))]
SMALL = ["batch_size=2", "num_generations=4", "max_completion_length=8", "max_prompt_length=32", "max_steps=2",
         "learning_rate=1e-3", "save_steps=1", "mixed_precision=no", "report_to=[]"]  # fmt: skip


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def samples(out):
    return [json.loads(line) for file in sorted((out / "samples").glob("*.jsonl")) for line in file.open()]


def shipped(judge, model, out, *more):  # noqa: F811
    return load_recipe(
        "grpo",
        "qwen2.5-1.5b-rubric-grpo",
        [f"model_name_or_path={model}", f"output_dir={out}", *SMALL, f"rewards.0.judge.base_url={judge.url}",
         f"rewards.0.judge.cache={out}/judge.sqlite", "rewards.0.judge.retries=1", *more],
    )  # fmt: skip


def by_letters(ask):
    letters = sum(c.isalpha() for c in ask.part("answer"))
    return ask.verdict(letters % 5, letters % 3, 2, 0, 0)


def test_two_steps_of_the_shipped_recipe(judge, tiny_model_dir, tmp_path):  # noqa: F811
    judge.script = by_letters
    GRPOTrainer(shipped(judge, tiny_model_dir, tmp_path / "a"), train_dataset=ROWS).train()
    steps = lines(tmp_path / "a")
    assert len(steps) == 2
    assert all(0 <= s["reward"] <= 1 for s in steps)
    assert any(s["grad_norm"] > 0 for s in steps)
    assert steps[0]["reward_outcomes/helpful/score"] == 8
    assert steps[0]["judge/helpful/failures"] == 0
    shown = [s["extra"]["helpful_scores"] for s in samples(tmp_path / "a")]
    names = {c.name for c in load_rubric("helpful").criteria}
    assert shown and all(set(scores) in (names, {"empty"}) for scores in shown)


def test_rows_without_a_verdict_take_no_part(judge, tiny_model_dir, tmp_path):  # noqa: F811
    asked = []

    def every_third_fails(ask):
        asked.append(ask)
        return Answer("", status=404) if len(asked) % 3 == 0 else by_letters(ask)

    judge.script = every_third_fails
    GRPOTrainer(shipped(judge, tiny_model_dir, tmp_path / "a"), train_dataset=ROWS).train()
    first = lines(tmp_path / "a")[0]
    assert first["reward_outcomes/helpful/error"] > 0
    assert first["reward_outcomes/helpful/error"] + first["reward_outcomes/helpful/score"] == 8


@pytest.mark.parametrize("function", ["exact_match", "math_answer"])
def test_two_steps_of_a_hybrid(judge, tiny_model_dir, tmp_path, function):  # noqa: F811
    judge.script = lambda ask: ask.verdict(float(len(ask.part("answer")) % 2))
    spec = {"function": function, "judge": {"base_url": judge.url, "model": "m"}}
    config = GRPOConfig(
        model_name_or_path=str(tiny_model_dir), output_dir=str(tmp_path), batch_size=2, num_generations=4,
        max_completion_length=8, max_steps=2, learning_rate=1e-3, rewards=[spec],
    )  # fmt: skip
    GRPOTrainer(config, train_dataset=ROWS).train()
    steps = lines(tmp_path)
    assert len(steps) == 2
    assert 0 < steps[0][f"hybrid/{function}/asked"] <= 1
    assert steps[0][f"reward_outcomes/{function}/score"] == 8


def test_two_steps_with_a_judge_that_the_run_loads(tiny_model_dir, tmp_path):
    """An untrained judge gives no verdict, and the rows that it was asked about have no reward."""
    judge_dir = init_model(
        tmp_path / "judge", texts=["You grade answers that another system wrote."], vocab_size=300, hidden_size=32, num_layers=1,
        num_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    spec = {"function": "exact_match", "judge": {"model": str(judge_dir), "max_tokens": 4}}
    config = GRPOConfig(
        model_name_or_path=str(tiny_model_dir), output_dir=str(tmp_path / "run"), batch_size=2, num_generations=4,
        max_completion_length=8, max_steps=2, learning_rate=1e-3, on_error="skip", rewards=[spec, "think_format"],
    )  # fmt: skip
    GRPOTrainer(config, train_dataset=ROWS).train()
    steps = lines(tmp_path / "run")
    assert len(steps) == 2
    asked = round(8 * steps[0]["hybrid/exact_match/asked"])
    assert asked > 0
    assert steps[0]["reward_outcomes/exact_match/malformed"] == asked
    assert steps[0]["judge/exact_match/failures"] == 1.0
    assert steps[0]["judge/exact_match/latency_seconds"] > 0
