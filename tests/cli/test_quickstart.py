"""The quickstart's road on a few steps: every file that it promises, and no directory of somebody else's emptied."""

from __future__ import annotations

import json

import pytest

from llmrl.cli import quickstart
from llmrl.cli.main import main
from llmrl.config.load import load_recipe
from llmrl.data import addition

SHORT = {"sft": ["max_steps=2", "batch_size=4"], "grpo": ["max_steps=1", "batch_size=2", "num_generations=2"]}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(addition, "PROBLEMS", {"demonstrations": 12, "prompts": 4, "held_out": 3})
    monkeypatch.setitem(quickstart._MODEL, "hidden_size", 16)
    monkeypatch.setitem(quickstart._MODEL, "intermediate_size", 32)
    monkeypatch.setattr(
        quickstart, "load_recipe", lambda kind, path, changes: load_recipe(kind, path, [*changes, *SHORT[kind]])
    )


def test_it_leaves_models_curves_results_and_a_summary(short, tmp_path, capsys):
    out = tmp_path / "quickstart"
    assert main(["quickstart", "--seed", "5", "--output-dir", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seed"] == 5 and summary["problems"] == 3 and summary["seconds"] > 0
    for name in ("accuracy_before", "accuracy_after", "sampled_before", "sampled_after"):
        low, high = summary[f"{name}_interval"]
        assert 0 <= low <= summary[name] <= high <= 1
    for path in (
        "data/held_out.jsonl",
        "sft/model",
        "grpo/model",
        "grpo/curves.png",
        "before/greedy.json",
        "after/sampled.json",
    ):
        assert (out / path).exists(), path
    printed = capsys.readouterr().out
    assert "curves.png" in printed and "greedy" in printed
    results = json.loads((out / "before" / "greedy.json").read_text())
    assert results["accuracy"] == summary["accuracy_before"] and results["manifest"]["sampling"]["temperature"] == 0
    assert main(["quickstart", "--output-dir", str(out)]) == 0  # again, afresh
    assert json.loads((out / "summary.json").read_text())["seed"] == 0


def test_a_directory_that_is_not_its_own_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["quickstart", "--output-dir", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.tex").exists()
    assert "--output-dir" in capsys.readouterr().err
