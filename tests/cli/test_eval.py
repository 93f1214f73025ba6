"""`llmrl eval` from the command line, on a model that knows nothing."""

from __future__ import annotations

import json

import pytest

from llmrl.cli.main import main
from llmrl.config.load import load_recipe
from llmrl.errors import ConfigError


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"id": f"p{i}", "question": f"the answer is {i}", "answer": str(i)} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "no answer", "answer": "x y z ?"}]))
    return path


def test_several_completions_are_sampled_and_reported(problems, tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "new" / "results.json"
    arguments = ["--model", str(tiny_model_dir), "--data", str(problems), "--n", "4", "--output", str(out)]
    assert main(["eval", *arguments, "max_completion_length=6"]) == 0
    results = json.loads(out.read_text())
    assert (results["n"], results["samples"]) == (4, 4)
    assert all(len(set(row["completions"])) > 1 for row in results["per_row"])
    low, high = results["interval"]
    assert low <= results["accuracy"] <= high and sorted(results["pass_at_k"]) == ["1", "2", "4"]
    printed = capsys.readouterr().out
    assert "4 x 4" in printed and "95% interval" in printed and "`question` is the prompt" in printed


def test_what_would_fail_after_the_sampling_fails_before_it(problems, tiny_model_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "results.json"):
        arguments = ["--model", str(tiny_model_dir), "--data", str(problems), "--output", str(output)]
        assert main(["eval", *arguments]) == 2
        assert "output: " in capsys.readouterr().err


def test_several_greedy_completions_are_refused():
    given = ["model_name_or_path=m", "data=d.jsonl"]
    assert load_recipe("eval", None, given).temperature == 0
    assert load_recipe("eval", None, [*given, "n=4"]).temperature == 1
    assert load_recipe("eval", None, [*given, "n=4", "temperature=0.6"]).temperature == 0.6
    with pytest.raises(ConfigError, match="n=4 equal completions"):
        load_recipe("eval", None, [*given, "n=4", "temperature=0"])
