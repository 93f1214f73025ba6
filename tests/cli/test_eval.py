"""`llmrl eval` from the command line, on a model that knows nothing."""

from __future__ import annotations

import json
import shutil

import pytest

from llmrl.cli.main import main
from llmrl.config.benchmark import BenchmarkSpec
from llmrl.config.evaluation import resolved
from llmrl.config.load import load_recipe
from llmrl.errors import ConfigError
from llmrl.rollout.local import LocalEngine


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"id": f"p{i}", "question": f"the answer is {i}", "answer": str(i)} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "no answer", "answer": "x y z ?"}]))
    return path


@pytest.fixture
def benchmark(problems):
    """A benchmark of the user's own, beside its problems."""
    path = problems.with_name("mine.yaml")
    path.write_text(
        "title: mine\ndata: problems.jsonl\nscorer: exact_match\nmax_completion_length: 6\n"
        'prompts: {chat: {user: "{question}?"}, plain: {text: "{question}", cut: ["q"]}}\n'
    )
    problems.write_text("".join(line + "\n" for line in problems.read_text().splitlines()[:3]))
    return path


def test_several_completions_are_sampled_and_reported(problems, tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "new" / "results.json"
    arguments = ["--model", str(tiny_model_dir), "--data", str(problems), "--n", "4", "--output", str(out)]
    assert main(["eval", *arguments, "max_completion_length=6"]) == 0
    results = json.loads(out.read_text())
    assert (results["n"], results["samples"]) == (4, 4)
    assert results["manifest"]["sampling"]["temperature"] == 1 and len(results["unusable_answers"]) == 1
    assert all(len(set(row["completions"])) > 1 for row in results["per_row"])
    low, high = results["interval"]
    assert low <= results["accuracy"] <= high and sorted(results["pass_at_k"]) == ["1", "2", "4"]
    assert results["maj_at_k"]["1"] == pytest.approx(results["accuracy"]) and 0 <= results["format_rate"] <= 1
    printed = capsys.readouterr().out
    assert "4 x 4" in printed and "95% interval" in printed and "`question` is the prompt" in printed


def test_a_benchmark_of_ones_own_with_its_templates(benchmark, tiny_model_dir, tmp_path, capsys):
    arguments = [
        "eval",
        "--model",
        str(tiny_model_dir),
        "--benchmark",
        str(benchmark),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert (result["benchmark"], result["n"], result["samples"]) == ("mine", 3, 1)
    assert result["manifest"]["template"]["name"] == "chat" and result["manifest"]["chat_template_sha256"]
    before = (tmp_path / "out" / "mine.json").read_bytes()
    assert main(arguments) == 0
    assert "complete and of the same settings" in capsys.readouterr().out
    for changed in (["--template", "plain"], ["seed=1"]):
        assert main([*arguments, *changed]) == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.json").read_bytes() == before
    assert main([*arguments, "--template", "plain", "--overwrite"]) == 0
    result = json.loads((tmp_path / "out" / "mine.json").read_text())
    assert result["manifest"]["template"]["text"] == "{question}" and result["manifest"]["chat_template_sha256"] is None


def test_what_would_fail_after_the_sampling_fails_before_it(benchmark, tiny_model_dir, tmp_path, capsys, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("something was sampled")

    monkeypatch.setattr(LocalEngine, "generate", never)
    (tmp_path / "file").write_text("")
    (tmp_path / "other.json").write_text("{}")
    bare, mute = tmp_path / "bare", tmp_path / "mute"
    for folder, missing in ((bare, "tokenizer*"), (mute, "chat_template*")):
        shutil.copytree(tiny_model_dir, folder)
        for file in folder.glob(missing):
            file.unlink()
    code = tmp_path / "code.yaml"
    code.write_text(benchmark.read_text().replace("exact_match", "code_tests"))
    shared = ["--model", str(tiny_model_dir)]
    mine = ["--benchmark", str(benchmark)]
    for arguments, message in (
        ([*shared, "--benchmark", "math5000"], "did you mean math500"),
        ([*shared, "--benchmark", f"{benchmark},math5000"], "did you mean math500"),
        ([*shared, *mine, "--template", "qwen"], "has no template 'qwen'; it has: chat, plain"),
        ([*shared, "--benchmark", str(tmp_path / "no.yaml")], "no such file"),
        ([*shared, *mine, "--output", str(tmp_path / "file" / "results.json")], "output: "),
        ([*shared, *mine, "--output", str(tmp_path / "other.json")], "is no result of llmrl"),
        ([*shared, "--benchmark", f"{benchmark},{code}", "--output", "r.json"], "one file, and there are 2"),
        ([*shared, "--benchmark", str(code)], "allow_code_execution"),
        (["--model", str(bare), *mine], "has no tokenizer"),
        (["--model", str(mute), *mine], "no chat template: --template plain asks it as plain text"),
        ([*shared, *mine, "max_completion_length=510"], "max_completion_length="),
        ([*shared, *mine, "n=4", "temperature=0"], "n=4 equal completions"),
        ([*mine], "give the model"),
        ([*shared], "give `benchmark`"),
        ([*shared, *mine, "--data", "d.jsonl", "--data-dir", "d"], "and no data_dir"),
        ([*shared, "--benchmark", f"{benchmark},{code}", "--data", "d.jsonl"], "give one benchmark with it"),
        ([*shared, "--data", "d.jsonl", "--template", "chat"], "template is for benchmarks"),
        ([*shared, *mine, "--predictions", "p.jsonl"], "leave --model out"),
    ):
        assert main(["eval", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error, (arguments, error)


def test_the_problems_of_a_benchmark_may_be_a_file(benchmark, tmp_path, capsys):
    rows = [{"id": f"other{i}", "question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(2)]
    (tmp_path / "elsewhere.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictions, out = tmp_path / "p.jsonl", tmp_path / "r.json"
    predictions.write_text('{"id": "other0", "completion": "0"}\n{"id": "other1", "completion": "3"}\n')
    arguments = [
        "--benchmark",
        str(benchmark),
        "--predictions",
        str(predictions),
        "--data",
        str(tmp_path / "elsewhere.jsonl"),
    ]
    assert main(["eval", *arguments, "--output", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["accuracy"] == 0.5 and result["manifest"]["data"]["path"].endswith("elsewhere.jsonl")


def test_completions_of_a_file_are_judged_without_a_model(benchmark, tmp_path, capsys):
    predictions, out = tmp_path / "p.jsonl", tmp_path / "r.json"
    predictions.write_text('{"id": "p1", "completion": "1"}\n{"id": "p2", "completion": "3"}\n')
    arguments = ["eval", "--benchmark", str(benchmark), "--predictions", str(predictions), "--output", str(out)]
    assert main(arguments) == 2
    assert "no completion" in capsys.readouterr().err
    for change, says in ((["--n", "4"], "n would change nothing"), (["--model", "m"], "leave --model out")):
        assert main([*arguments, *change]) == 2
        assert says in capsys.readouterr().err
    assert main([*arguments, "--allow-missing"]) == 0
    result = json.loads(out.read_text())
    assert result["accuracy"] == pytest.approx(1 / 3) and result["missing"] == ["p0"]
    assert main([*arguments, "--allow-missing"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_flags_change_what_the_benchmark_says():
    def found(own, *changes):
        spec = BenchmarkSpec(title="t", data="d", prompts={"p": {"text": "{question}"}}, **own)
        config = load_recipe("eval", None, ["model_name_or_path=m", "benchmark=b", *changes])
        result = resolved(spec, config)
        return result.n, result.temperature

    greedy, sampled = {}, {"n": 4, "temperature": 0.6}
    assert found(greedy) == (1, 0) and found(sampled) == (4, 0.6)
    assert found(greedy, "n=4") == (4, 1) and found(greedy, "n=4", "temperature=0.6") == (4, 0.6)
    assert found(sampled, "n=32") == (32, 0.6) and found(sampled, "temperature=0") == (1, 0)
    with pytest.raises(ConfigError, match="n=4 equal completions"):
        found(sampled, "n=4", "temperature=0")
