"""All benchmarks that come with llmrl, from the command line to the result files, with a small model and a few real problems each."""

from __future__ import annotations

import gzip
import json

import pytest
import yaml

from llmrl.cli.main import main
from llmrl.evaluation.benchmarks import SPECS, local_copy, shipped
from llmrl.evaluation.result import EvalResult
from tests.conftest import SHARED_DATA

PROBLEMS = 2


def subset(name, folder):
    """The benchmark's file with the shortest problems of the real ones; another number of them is another benchmark, so it gets a name."""
    spec = yaml.safe_load((SPECS / f"{name}.yaml").read_text())
    file = local_copy([name, *([spec["copies"]] if "copies" in spec else [])], SHARED_DATA)
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    # MBPP's problems are a part of the sanitized set.
    lines = [line for line in text.splitlines() if name != "mbpp" or json.loads(line)["split"] == "test"]
    (folder / f"{name}.jsonl").write_text("\n".join(sorted(lines, key=len)[:PROBLEMS]) + "\n")
    out = folder / f"few_{name}.yaml"
    out.write_text(yaml.safe_dump({**spec, "data": f"{name}.jsonl", "problems": PROBLEMS}))
    return out


@pytest.mark.slow
def test_every_benchmark_runs_end_to_end(vllm_model, tmp_path, capsys):
    if not SHARED_DATA.is_dir():
        pytest.skip("real data absent")
    files = [subset(name, tmp_path) for name in shipped()]
    arguments = [
        "--model",
        str(vllm_model),
        "--benchmark",
        ",".join(map(str, files)),
        "--output",
        str(tmp_path / "out"),
    ]
    changes = ["n=2", "max_completion_length=8", "allow_code_execution=true"]
    assert main(["eval", *arguments, *changes]) == 0
    printed = capsys.readouterr().out
    for file in files:
        found = json.loads((tmp_path / "out" / f"{file.stem}.json").read_text())
        choices = found["manifest"]["sampling"]["mode"] == "choices"
        assert (found["benchmark"], found["n"], found["samples"]) == (file.stem, PROBLEMS, 1 if choices else 2)
        assert 0 <= found["interval"][0] <= found["accuracy"] <= found["interval"][1] <= 1
        assert found["interval"][0] < found["interval"][1] and not found["failures"] and f" {file.stem} " in printed
        journal = tmp_path / "out" / f"{file.stem}.samples.jsonl"
        assert journal.exists() is not choices
        assert EvalResult.load(tmp_path / "out" / f"{file.stem}.json").to_dict() == found
    ifeval = json.loads((tmp_path / "out" / "few_ifeval.json").read_text())
    assert set(ifeval["also"]) == {"prompt_loose", "instruction_strict", "instruction_loose"}
    math = json.loads((tmp_path / "out" / "few_math500.json").read_text())
    assert set(math["breakdown"]) == {"subject", "level"} and set(math["maj_at_k"]) == {"1", "2"}
