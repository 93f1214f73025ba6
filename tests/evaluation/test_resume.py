"""A killed evaluation goes on from its samples; a file of samples that can't be gone on from is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from llmrl.cli.main import main
from llmrl.errors import ConfigError, DataError
from llmrl.evaluation.journal import Journal
from llmrl.rollout.local import LocalEngine
from llmrl.types import Completion
from tests.evaluation import resume_worker
from tests.processes import run_script

MANIFEST = {
    "seed": 0,
    "sampling": {"n": 2, "temperature": 0.5},
    "model": {"name": "a", "weights_sha256": "f"},
    "verifier": {"sha256": "1"},
}
COMPLETION = Completion((5, 7), (), "stop", "twelve, 十二")


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"p{i}", "question": f"{i} + 1", "answer": f"{i + 1}"}) + "\n" for i in range(12))
    )
    return path


def test_a_killed_evaluation_gives_the_result_of_an_unbroken_one(problems, tiny_model_dir, tmp_path, monkeypatch):
    def arguments(folder):
        options = [
            "--n",
            "3",
            "max_completion_length=24",
            "scorer=exact_match",
            "batch_size=5",
            "rollout.max_batch_tokens=200",
        ]
        return [
            "eval",
            "--model",
            str(tiny_model_dir),
            "--data",
            str(problems),
            *options,
            "--output",
            str(folder / "r.json"),
        ]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(arguments(whole)) == 0
    done = run_script(Path(resume_worker.__file__), 17, *arguments(broken))
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (broken / "r.json").exists()
    written = (broken / "r.samples.jsonl").read_bytes()
    assert written.count(b"\n") == 18 and not written.endswith(b"\n")  # the header, the samples and a torn line

    asked, generate = [], LocalEngine.generate

    def counting(self, prompts, *args, **kwargs):
        asked.extend(prompts)
        return generate(self, prompts, *args, **kwargs)

    monkeypatch.setattr(LocalEngine, "generate", counting)
    assert main(arguments(broken)) == 0
    assert len(asked) == 12 * 3 - 17
    assert (broken / "r.json").read_bytes() == (whole / "r.json").read_bytes()
    rows = [json.loads(line) for line in (broken / "r.samples.jsonl").read_text().splitlines()[1:]]
    assert sorted((r["id"], r["sample"]) for r in rows) == sorted((f"p{i}", s) for i in range(12) for s in range(3))

    asked.clear()
    assert main(arguments(broken)) == 0  # complete
    (broken / "r.json").unlink()
    assert main(arguments(broken)) == 0  # only scored again
    assert not any(asked) and (broken / "r.json").read_bytes() == (whole / "r.json").read_bytes()
    assert main([*arguments(broken), "n=4"]) == 0  # a fourth sample of each, beside the three
    assert [p.id for p in asked] == [f"p{i}#3" for i in range(12)]
    first, more = (json.loads((d / "r.json").read_text())["per_row"] for d in (whole, broken))
    assert [row["completions"] for row in first] == [row["completions"][:3] for row in more]


def test_samples_are_there_as_soon_as_they_are_added(tmp_path):
    path = tmp_path / "s.jsonl"
    with Journal(path, MANIFEST) as journal:
        journal.add("p", 1, COMPLETION)
        assert json.loads(path.read_text().splitlines()[1])["text"] == "twelve, 十二"
        with pytest.raises(ConfigError, match="being written by another"):
            Journal(path, MANIFEST)
    with Journal(path, MANIFEST) as journal:
        assert journal.found("p", 1) == COMPLETION and journal.found("p", 0) is None and len(journal) == 1


def test_half_a_surrogate_pair_is_kept(tmp_path):
    odd = Completion((5,), (), "stop", "\udfff\x00\u2028")
    with Journal(tmp_path / "s.jsonl", MANIFEST) as journal:
        journal.add("p", 0, odd)
    with Journal(tmp_path / "s.jsonl", MANIFEST) as journal:
        assert journal.found("p", 0) == odd


def test_samples_of_other_settings_are_refused_with_what_differs(tmp_path):
    path = tmp_path / "s.jsonl"
    with Journal(path, MANIFEST) as journal:
        journal.add("p", 0, COMPLETION)
    other = {
        **MANIFEST,
        "sampling": {"n": 8, "temperature": 0.7},
        "model": {"name": "b", "weights_sha256": "f"},
        "verifier": {"sha256": "2"},
    }
    with pytest.raises(ConfigError) as refused:
        Journal(path, other)
    assert "sampling.temperature is 0.5 there and 0.7 here" in str(refused.value)
    assert not any(
        word in str(refused.value) for word in ("verifier", "model.name", "sampling.n ")
    )  # none changes a sample
    with pytest.raises(ConfigError, match=r'model.name is "a" there and "b" here'):
        Journal(path, {**MANIFEST, "model": {"name": "b", "weights_sha256": None}})
    with Journal(path, other, overwrite=True) as journal:
        assert len(journal) == 0
    path.write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="no file of samples"):
        Journal(path, MANIFEST, overwrite=True)


def test_a_line_that_is_no_sample_is_named(tmp_path):
    path = tmp_path / "s.jsonl"
    with Journal(path, MANIFEST) as journal:
        journal.add("p", 0, COMPLETION)
    path.write_text(path.read_text() + '{"id": "p"}\n')
    with pytest.raises(DataError, match=r"s.jsonl:3 can't be read"):
        Journal(path, MANIFEST)
