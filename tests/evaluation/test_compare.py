"""What `llmrl compare` says of two result files, and what it refuses."""

from __future__ import annotations

import copy
import json

import pytest

from llmrl.cli.main import main
from llmrl.errors import DataError
from llmrl.evaluation.compare import comparable, compare, plot_comparison, read_result

MANIFEST = {
    "model": {"name": "models/base", "weights_sha256": "a1"},
    "template": {"name": "chat", "system": None, "user": "{question}", "text": None, "cut": []},
    "chat_template_sha256": "c1",
    "sampling": {"temperature": 0.6, "max_tokens": 4096, "n": 4},
    "engine": {"kind": "vllm", "version": "0.32.0", "dtype": "bfloat16"},
    "data": {"path": "data/eval.jsonl", "sha256": "d1", "n": 4},
    "seed": 0,
    "verifier": {"function": "math_answer", "args": {}, "threshold": 0.5, "sha256": "v1"},
    "versions": {"torch": "2.13.0"},
}


def result(*rows, benchmark="math500", missing=(), **manifest):
    """A result with a row for each (id, verdicts); `manifest`: parts that differ, with __ for a dot."""
    whole = copy.deepcopy(MANIFEST)
    for key, value in manifest.items():
        *outer, last = key.split("__")
        part = whole
        for name in outer:
            part = part[name]
        part[last] = value
    return {
        "format": "llmrl-result/1", "benchmark": benchmark, "missing": list(missing), "manifest": whole,
        "per_row": [{"id": id, "correct": [c == "1" for c in verdicts]} for id, verdicts in rows],
    }  # fmt: skip


A = result(("p", "0000"), ("q", "1100"), ("r", "1111"), ("s", "1000"))
B = result(("s", "1000"), ("p", "1100"), ("q", "1111"), ("r", "1011"), model__name="models/new")


def test_problems_are_paired_by_id_and_b_is_compared_with_a():
    found = compare(A, B, files=("old.json", "new.json"))
    assert found.difference == pytest.approx((0.5 + 0.5 - 0.25 + 0) / 4)
    assert found.interval[0] < found.difference < found.interval[1]
    assert [(f.id, f.a, f.b) for f in found.won] == [("p", 0, 0.5), ("q", 0.5, 1)]
    assert [(f.id, f.a, f.b) for f in found.lost] == [("r", 1, 0.75)]
    assert found.a.accuracy == pytest.approx(7 / 16) and found.b.accuracy == pytest.approx(10 / 16)
    # of the 8 signs of 2, 2, -1 quarters, those with a sum of 3 or more (or -3 or less): 2+2+1, 2+2-1, and their opposites
    assert found.p_value == pytest.approx(4 / 8) and found.test == "sign-flip permutation test, exact"
    assert (found.a.model, found.b.model, found.warnings, found.objections) == ("models/base", "models/new", [], [])


def test_the_other_way_round_the_signs_change():
    one, other = compare(A, B), compare(B, A)
    assert other.difference == -one.difference and other.p_value == one.p_value
    assert other.interval == pytest.approx((-one.interval[1], -one.interval[0]))
    assert [f.id for f in other.lost] == [f.id for f in one.won]


def test_one_sample_a_problem_is_mcnemars_test():
    rows = [(f"p{i}", "0") for i in range(6)] + [("x", "1")]
    found = compare(result(*rows), result(*[(id, "1") for id, _ in rows]))
    assert found.test == "McNemar's exact test" and found.p_value == pytest.approx(2 / 2**6)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"data__sha256": "d2"}, "the problems differ"),
        ({"benchmark": "aime24"}, "the benchmarks differ: 'math500' and 'aime24'"),
        ({"verifier__function": "exact_match"}, 'verifier.function is "math_answer" in A and "exact_match" in B'),
        ({"verifier__threshold": 0.9}, "verifier.threshold is 0.5 in A and 0.9 in B"),
    ],
)
def test_other_problems_and_another_judge_are_refused_unless_forced(change, said):
    other = result(*[(r["id"], "1111") for r in A["per_row"]], **change)
    with pytest.raises(DataError, match=said) as error:
        compare(A, other, files=("old.json", "new.json"))
    assert "old.json (A) and new.json (B)" in str(error.value) and "--force" in str(error.value)
    assert said in compare(A, other, force=True).objections[0]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"verifier__sha256": "v2"}, "the verifiers' source differs"),
        ({"template__user": "{question} Think."}, 'template.user is "{question}" in A'),
        ({"sampling__temperature": 1.0}, "sampling.temperature is 0.6 in A and 1.0 in B"),
        ({"engine__kind": "local"}, 'engine.kind is "vllm" in A and "local" in B'),
        ({"chat_template_sha256": "c2"}, "the chat templates differ, of the same weights"),
        ({"data__sha256": None, "sampling": None}, "B does not say its data.sha256, sampling"),
        ({"template": {"name": None, "user": None, "cut": []}}, "B does not say its template"),
        ({"missing": ["p", "q"]}, "2 problems of B have no completion and count as wrong: p, q"),
    ],
)
def test_other_settings_are_said(change, said):
    objections, warnings = comparable(A, result(*[(r["id"], "1111") for r in A["per_row"]], **change))
    assert objections == [] and len(warnings) == 1 and said in warnings[0]


def test_what_does_not_matter_is_not_said():
    other = result(
        *[(r["id"], "1111") for r in A["per_row"]], seed=1, versions={"torch": "2.12.0"}, data__path="elsewhere.jsonl",
        model={"name": "other", "weights_sha256": "b2"}, chat_template_sha256="c9", engine__version="0.31.0",
    )  # fmt: skip
    assert comparable(A, other) == ([], [])


def test_other_numbers_of_samples_are_said():
    other = result(("p", "0"), ("q", "11"), ("r", "1"), ("s", "1"))
    assert comparable(A, other)[1] == ["samples a problem: 4 in A and 1 to 2 in B"]


def test_problems_of_one_file_only_are_refused_or_left_out():
    other = result(("p", "1111"), ("q", "1111"), ("x", "0000"))
    with pytest.raises(DataError, match="2 problems are only in A, and are left out: r, s"):
        compare(A, other)
    found = compare(A, other, force=True)
    assert found.problems == 2 and found.difference == pytest.approx(0.75)
    assert (found.only_a, found.only_b) == (["r", "s"], ["x"])
    with pytest.raises(DataError, match="no problem in common"):
        compare(A, result(("x", "1")), force=True)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is no JSON"),
        ("[1]", "is no result that this version reads"),
        ('{"format": "llmrl-result/9", "per_row": []}', "its format is 'llmrl-result/9'"),
        ('{"format": "llmrl-result/1", "per_row": []}', "per_row must list problems"),
        ('{"format": "llmrl-result/1", "per_row": [{"id": "a", "correct": []}]}', "per_row must list problems"),
        ('{"format": "llmrl-result/1", "per_row": [{"id": "a", "correct": [true]}, {"id": "a", "correct": [true]}]}', "1 ids stand more than once: a"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused(content, said, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_result(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"b\.json can't be read"):
        read_result(tmp_path / "b.json")


@pytest.fixture
def files(tmp_path):
    for name, value in (("a", A), ("b", B), ("other", result(("p", "1"), benchmark="aime24"))):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def test_the_command_prints_tables_and_draws_a_picture(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["compare", str(files / "a.json"), str(files / "b.json"), "-o", str(files / "new" / "c.svg")]) == 0
    out = capsys.readouterr().out
    assert "+0.1875" in out and "p = 0.5 (sign-flip permutation test, exact" in out
    assert "2 better in B, 1 worse, 1 as in A" in out and "models/new" in out
    assert (files / "new" / "c.svg").read_text().lstrip().startswith("<?xml")


def test_the_commands_json_is_all_of_stdout(files, capsys):
    picture = files / "c.png"
    assert main(["compare", str(files / "a.json"), str(files / "b.json"), "--json", "-o", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "llmrl-comparison/1" and found["difference"] == pytest.approx(0.1875)
    assert found["won"][0] == {"id": "p", "a": 0.0, "b": 0.5} and found["a"]["file"].endswith("a.json")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_refuses_with_exit_code_2(files, capsys):
    a, other = str(files / "a.json"), str(files / "other.json")
    assert main(["compare", a, other]) == 2
    assert "the benchmarks differ" in capsys.readouterr().err
    assert main(["compare", a, other, "--force"]) == 0
    assert "not comparable: the benchmarks differ" in capsys.readouterr().out
    assert main(["compare", a, str(files / "none.json")]) == 2
    assert main(["compare", a, a, "-o", str(files / "c.txt")]) == 2
    assert main(["compare", a, a, "--flips", "-1"]) == 2


def test_a_picture_of_two_equal_results_has_no_changes_to_draw(files):
    assert plot_comparison(compare(A, A), files / "same.png").exists()
