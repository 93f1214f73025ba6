"""`llmrl check` on small models and files, as a user runs it."""

from __future__ import annotations

import json

import pytest

from llmrl.cli.main import main
from tests.conftest import shared_data


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def data(tmp_path):
    def write(rows, name="d.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def _check(capsys, kind, model, path, *overrides):
    code = main(["check", kind, f"model_name_or_path={model}", "output_dir=o", f"dataset={path}", *overrides])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


CHAT = [
    {"messages": [{"role": "user", "content": "three times four"}, {"role": "assistant", "content": f"twelve {i}"}]}
    for i in range(6)
]
SUMS = [{"prompt": f"{i} plus 1 is", "answer": str(i + 1)} for i in range(10)]


def test_sft_shows_what_is_learned(capsys, data, tiny_model_dir):
    code, out, _ = _check(capsys, "sft", tiny_model_dir, data(CHAT), "batch_size=2", "max_steps=3")
    assert code == 0
    assert "⟦twelve 0<|im_end|>⟧" in out and "⟦three" not in out
    assert out.count("learned)") >= 3
    for text in (
        "6 kept, 0 dropped",
        "median",
        "p95",
        "A completion ends with: '<|im_end|>'",
        "a step",
        "2 rows",
        "steps",
        "updates",
    ):
        assert text in out
    for term in ("weights", "gradients", "optimizer", "activations", "head", "peak"):
        assert term in out
    assert "reference" not in out and "nothing found that would stop a run" in out


def test_colour_instead_of_brackets(capsys, data, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = _check(capsys, "sft", tiny_model_dir, data(CHAT))
    assert "⟦" not in out and "\x1b[1;32mtwelve 0<|im_end|>" in out


def test_grpo_tries_the_rewards(capsys, data, tiny_model_dir):
    path = data([*SUMS, {"prompt": "a bad one", "answer": ""}])
    code, out, _ = _check(
        capsys, "grpo", tiny_model_dir, path, "rewards=math_answer", "batch_size=4", "num_generations=2"
    )
    assert code == 0
    table = {
        line.rsplit(maxsplit=2)[0]: line.split()[-2:]
        for line in out.splitlines()
        if line.startswith(("the reference", "a wrong", "an empty"))
    }
    assert table == {
        "the reference, boxed": ["1.000", "1.000"],
        "the reference alone": ["1.000", "1.000"],
        "a wrong one": ["0.000", "0.000"],
        "an empty one": ["0.000", "0.000"],
    }
    assert "1 of 11 reference answers can't be verified" in out
    assert "4 prompts x 2 completions = 8 rollouts" in out
    assert "reference" in out and "key-value cache" in out


def test_a_reward_that_fails_is_a_problem(capsys, data, tiny_model_dir, tmp_path):
    (tmp_path / "bad.py").write_text("def boom(completions, **kw):\n    raise ValueError('no')\n")
    code, out, _ = _check(capsys, "grpo", tiny_model_dir, data(SUMS), f"rewards={tmp_path}/bad.py:boom")
    assert code == 1
    assert "problem: reward 'boom': 8 of 8 rows ended in 'error'" in out and "would stop a run" in out


def test_completions_that_do_not_fit_are_a_problem(capsys, data, tiny_model_dir):
    code, out, _ = _check(
        capsys, "grpo", tiny_model_dir, data(SUMS), "rewards=math_answer", "max_completion_length=512"
    )
    assert code == 1
    assert "10 prompts leave no room for max_completion_length 512 in the model's 512 positions" in out


def test_rewards_that_never_apply_are_a_problem(capsys, data, tiny_model_dir):
    path = data([{"prompt": "x", "note": "y"}])
    code, out, _ = _check(capsys, "grpo", tiny_model_dir, path, "rewards=math_answer")
    assert code == 1 and "no reward function gives any of these rows a reward" in out


def test_bad_rows_and_missing_models_end_with_one_message(capsys, data, tiny_model_dir):
    path = data([{"text": "fine"}, {"text": 5}])
    code, _, err = _check(capsys, "sft", tiny_model_dir, path)
    assert code == 2 and f"{path}:2" in err
    code, _, err = _check(capsys, "sft", "/nowhere/model", data(CHAT))
    assert code == 2 and "/nowhere/model" in err


def test_bad_evaluation_rows_are_found_too(capsys, data, tiny_model_dir):
    bad = data([{"messages": [{"role": "user", "content": "three"}]}], "bad.jsonl")
    code, _, err = _check(capsys, "sft", tiny_model_dir, data(CHAT), f"eval_dataset={bad}")
    assert code == 2 and "bad.jsonl:1: no assistant message" in err
    bad = data([{"prompt": ""}], "bad.jsonl")
    code, _, err = _check(capsys, "grpo", tiny_model_dir, data(SUMS), f"eval_dataset={bad}", "rewards=math_answer")
    assert code == 2 and "bad.jsonl:1: column 'prompt' is empty" in err
    code, out, _ = _check(capsys, "sft", tiny_model_dir, data(CHAT), "eval_fraction=0.3")
    assert code == 0 and "to evaluate on: 2 kept" in out


def test_real_prompts(capsys, tiny_model_dir):
    path = shared_data("eval_gsm8k.jsonl")
    code, out, _ = _check(
        capsys, "grpo", tiny_model_dir, path, "dataset.columns={prompt: question}", "dataset.max_rows=50", "rewards=math_answer",
        "max_prompt_length=256", "max_completion_length=100",
    )  # fmt: skip
    assert code == 0 and "the reference, boxed" in out
