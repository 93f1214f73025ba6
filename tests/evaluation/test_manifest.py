"""What tells one evaluation from another."""

from __future__ import annotations

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.evaluation.manifest import data_entry, differences, verifier_entry
from llmrl.models.digest import model_directory, tokenizer_digest, weights_digest


@pytest.fixture
def folder(tmp_path):
    for name, content in (("model-1.safetensors", b"abc"), ("model-2.safetensors", b"d"), ("config.json", b"{}")):
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_weights_are_told_by_their_files(folder, tmp_path_factory):
    before = weights_digest([folder])
    other = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert weights_digest([other]) == before and len(before) == 64
    (other / "model-1.safetensors").write_bytes(b"abd")
    assert weights_digest([other]) != before and weights_digest([folder, other]) != before
    assert weights_digest([tmp_path_factory.mktemp("empty")]) is None
    assert model_directory(str(folder)) == folder and model_directory("nobody/nothing") is None


def test_a_tokenizer_is_told_by_what_it_does_with_text(tiny_tokenizer):
    assert tokenizer_digest(tiny_tokenizer) == tokenizer_digest(tiny_tokenizer)
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    other.add_tokens(["<|new|>"])
    assert tokenizer_digest(other) != tokenizer_digest(tiny_tokenizer)


def test_the_verifier_counts_with_its_arguments_and_a_file_of_ones_own(tmp_path):
    plain = verifier_entry(RewardSpec(function="math_answer"))
    assert plain == verifier_entry(RewardSpec(function="math_answer"))
    other = verifier_entry(RewardSpec(function="math_answer", args={"rel_tol": 1e-3}), threshold=0.9)
    assert other["sha256"] == plain["sha256"] and other["args"] == {"rel_tol": 1e-3} and other["threshold"] == 0.9
    own = tmp_path / "own.py"
    found = []
    for text in ("x = 1", "x = 2"):
        own.write_text(text)
        found.append(verifier_entry(RewardSpec(function=f"{own}:f"))["sha256"])
    assert len({plain["sha256"], *found}) == 3


def test_problems_are_told_by_their_rows_in_order():
    rows = [{"id": "1", "answer": "é"}, {"id": "2", "answer": "y"}]
    entry = data_entry("a.jsonl", rows)
    assert (
        entry["n"] == 2
        and entry["sha256"] == data_entry("b.jsonl", [dict(reversed(r.items())) for r in rows])["sha256"]
    )
    assert entry["sha256"] != data_entry("a.jsonl", rows[::-1])["sha256"]


def test_differences_are_said_and_a_model_is_known_by_its_weights():
    old = {"model": {"name": "a", "weights_sha256": "f"}, "sampling": {"temperature": 0.6}, "seed": 0, "engine": None}
    assert differences(old, old) == []
    new = {
        **old,
        "model": {"name": "b", "weights_sha256": "f"},
        "sampling": {"temperature": 1.0, "top_p": 1.0},
        "engine": {"kind": "local"},
    }
    assert differences(old, new, ignore=("engine",)) == [
        "sampling.temperature is 0.6 there and 1.0 here",
        "sampling.top_p is null there and 1.0 here",
    ]
    assert 'engine.kind is null there and "local" here' in differences(old, new)
    assert (
        differences(old, {**old, "model": {"name": "b", "weights_sha256": None}})[0]
        == 'model.name is "a" there and "b" here'
    )
