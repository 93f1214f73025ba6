"""`llmrl try-reward`: a recipe's rewards by hand."""

from __future__ import annotations

import json

import pytest
import yaml

from llmrl.cli.main import main


@pytest.fixture
def recipe(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = [{"prompt": "three times four is", "answer": "12"}, {"prompt": "one is", "answer": "1"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(rewards, **settings):
        values = {
            "model_name_or_path": str(tiny_model_dir), "output_dir": str(tmp_path / "run"), "dataset": str(tmp_path / "rows.jsonl"),
            "rewards": rewards, **settings,
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return [str(tmp_path / "recipe.yaml")]

    return write


def test_every_part_is_shown(recipe, capsys):
    rewards = [{"function": "math_answer"}, {"function": "think_format", "weight": 0.5}]
    command = ["try-reward", *recipe(rewards), "--text", "so \\boxed{12}", "--text", "\\boxed{13}"]
    assert main(command) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert [line[:4] for line in lines if line[:1] == ["math_answer"]] == [
        ["math_answer", v, "1", "score"] for v in "10"
    ]
    assert [line[1] for line in lines if line[:1] == ["all"]] == ["1", "0"]
    assert "three times four" in out and "0.5" in out
    assert "read 13, the reference is 12" in out and "read 12," not in out


def test_rows_are_chosen_and_combined_as_in_training(recipe, capsys):
    rewards = [{"function": "math_answer"}, {"function": "exact_match"}]
    config = recipe(rewards, combine="product")
    assert main(["try-reward", *config, "--row", "2", "--text", "\\boxed{1}"]) == 0
    assert "one is" in capsys.readouterr().out
    assert main(["try-reward", *config, "--row", "3", "--text", "x"]) == 2
    assert "2 usable prompts" in capsys.readouterr().err
    assert main(["try-reward", *config, "--id", "nobody", "--text", "x"]) == 2
    assert "nobody" in capsys.readouterr().err


def test_a_function_that_fails_is_named(recipe, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def bad(completions, **kwargs):\n    raise ValueError('no such thing')\n")
    config = recipe([{"function": f"{tmp_path / 'bad.py'}:bad"}])
    (tmp_path / "answer.txt").write_text("anything")
    assert main(["try-reward", *config, "--file", str(tmp_path / "answer.txt")]) == 1
    assert "error" in capsys.readouterr().out
    assert main(["try-reward", *config, "--file", str(tmp_path / "absent.txt")]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_the_kind_is_the_recipe_s(recipe, capsys):
    rewards = [{"function": "exact_match", "weight": {"start": 2.0, "end": 0.0, "steps": 5}}]
    for settings in ({"beta": 0.1, "loss_type": ["sigmoid"]}, {"critic": "separate"}):  # of dpo, and of ppo
        assert main(["try-reward", *recipe(rewards, **settings), "--text", "12", "combine=product"]) == 0
        assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("all")] == ["2"]
    assert main(["try-reward", *recipe(rewards, critic="separate", learning_rat=1.0), "--text", "12"]) == 2
    said = capsys.readouterr().err
    assert "learning_rat:" in said and said.count("recipe.yaml: line") == 1, "what the nearest kind says"
    assert main(["try-reward", "grpo", "--config", "recipe.yaml", "--text", "12"]) == 2
    assert "without grpo" in capsys.readouterr().err
