"""Existing completions: the forms of their file, what is missing or too much, and the result."""

from __future__ import annotations

import gzip
import json

import pytest

from llmrl.errors import ConfigError, DataError
from llmrl.evaluation.also import summary
from llmrl.evaluation.benchmarks import load_benchmark
from llmrl.evaluation.predictions import matched, read_predictions, score_predictions

SUMS = """
title: Sums
data: rows.jsonl
prompts: boxed
scorer: exact_match
breakdown: topic
"""
ROWS = [
    {"id": f"s{i}", "question": f"{i} + 1?", "answer": str(i + 1), "topic": "odd" if i % 2 else "even"}
    for i in range(4)
]
RIGHT = [{"id": f"s{i}", "completion": rf"It is \boxed{{{i + 1}}}"} for i in range(4)]


@pytest.fixture
def sums(tmp_path):
    return own(tmp_path, ROWS, SUMS)


def own(tmp_path, rows, text):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(text)
    return load_benchmark(str(tmp_path / "sums.yaml"))


def written(tmp_path, rows, name="preds.jsonl"):
    file = tmp_path / name
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


@pytest.mark.parametrize("name", ["preds.jsonl", "preds.json", "preds.jsonl.gz"])
def test_one_completion_a_problem(tmp_path, sums, name):
    wrong = {"id": "s2", "completion": "no idea"}
    file = written(tmp_path, [RIGHT[1], RIGHT[0], RIGHT[3], wrong], name)
    found = json.loads(score_predictions(sums, file).save(tmp_path / "out.json").read_text())
    assert (found["benchmark"], found["n"], found["samples"], found["accuracy"]) == ("sums", 4, 1, 0.75)
    assert (
        found["interval"][0] < 0.75 < found["interval"][1] and found["missing"] == [] and found["format_rate"] == 0.75
    )
    assert {v: p["accuracy"] for v, p in found["breakdown"]["topic"].items()} == {"even": 0.5, "odd": 1.0}
    assert [row["id"] for row in found["per_row"]] == ["s0", "s1", "s2", "s3"]
    assert [row["answers"] for row in found["per_row"]] == [["1"], ["2"], [None], ["4"]]
    assert found["mean_length"] is found["truncation_rate"] is None  # nobody knows how many tokens these are
    assert found["manifest"]["data"]["n"] == 4 and found["manifest"]["model"]["name"] is None
    assert (
        found["manifest"]["verifier"]["function"] == "exact_match"
        and len(found["manifest"]["predictions"]["sha256"]) == 64
    )


def test_different_numbers_of_samples(tmp_path, sums):
    rows = [
        {"id": "s0", "completions": ["1", "7", "1", "1"]},
        {"id": "s1", "completions": ["2", "3"]},
        RIGHT[2],
        RIGHT[3],
    ]
    result = score_predictions(sums, written(tmp_path, rows))
    assert result.samples == 1 and result.accuracy == (3 / 4 + 1 / 2 + 1 + 1) / 4  # each problem counts alike
    assert result.pass_at_k == {1: result.accuracy, 2: 1.0, 4: 1.0}  # over the problems with so many
    assert result.maj_at_k is not None and result.maj_at_k[4] == 1.0
    assert [len(row[key]) for row in result.rows for key in ("correct", "rewards", "outcomes", "lengths", "finish", "notes")] == [
        n for n in (4, 2, 1, 1) for _ in range(6)
    ]  # fmt: skip


def test_what_is_missing_is_an_error_or_wrong(tmp_path, sums):
    rows = [
        {"id": "s0", "completions": ["1", "1"]},
        {"id": "s1", "completions": ["2", None]},
        {"id": "s2", "completions": []},
    ]
    file = written(tmp_path, rows)
    with pytest.raises(
        DataError, match=r"2 of 4 problems have no completion: 's2', 's3'; 1 of 4 .* null: 's1'.*--allow-missing"
    ):
        score_predictions(sums, file)
    result = score_predictions(sums, file, allow_missing=True)
    assert result.missing == ["s2", "s3"] and result.samples == 2 and result.accuracy == (1 + 1 / 2) / 4
    assert result.failures == {"missing": 5} and result.format_rate == 3 / 8
    assert result.rows[3]["outcomes"] == ["missing", "missing"] and result.rows[3]["correct"] == [False, False]
    assert result.rows[1]["outcomes"] == ["score", "missing"]
    empty = written(tmp_path, [{"id": f"s{i}", "completion": None} for i in range(4)])
    assert score_predictions(sums, empty, allow_missing=True).accuracy == 0.0


def test_an_empty_text_is_an_answer_that_is_wrong(tmp_path, sums):
    result = score_predictions(sums, written(tmp_path, [*RIGHT[:3], {"id": "s3", "completion": ""}]))
    assert (result.accuracy, result.missing, result.failures) == (0.75, [], {})


def test_chat_messages(tmp_path):
    turns = [
        {"role": "user", "content": r"put it in \boxed{}"}, {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "9"}, {"role": "assistant", "content": [{"type": "text", "text": "It is 4"}]},
    ]  # fmt: skip
    rows = [
        {"id": 1, "completion": turns},
        {"id": "b", "completions": [turns[-1:], {"role": "assistant", "content": "5"}]},
        {"id": "c", "completion": turns[:1]},
    ]
    assert read_predictions(written(tmp_path, rows)) == {"1": ["It is 4"], "b": ["It is 4", "5"], "c": [None]}


def test_a_result_file_can_be_judged_again(tmp_path, sums):
    first = score_predictions(sums, written(tmp_path, RIGHT)).save(tmp_path / "first.json")
    assert score_predictions(sums, first).accuracy == 1.0


def test_half_a_surrogate_pair_and_nul_outlive_the_result_file(tmp_path, sums):
    odd = [{**row, "completion": "\ud800\x00 " + row["completion"]} for row in RIGHT]
    first = score_predictions(sums, written(tmp_path, odd)).save(tmp_path / "first.json")
    assert json.loads(first.read_text(encoding="utf-8"))["per_row"][0]["completions"] == [odd[0]["completion"]]
    assert score_predictions(sums, first).accuracy == 1.0


def test_a_result_that_can_not_be_written_says_so(tmp_path, sums):
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(ConfigError, match="can't be written"):
        score_predictions(sums, written(tmp_path, RIGHT)).save(tmp_path / "taken.json")
    assert not list(tmp_path.glob(".tmp_*"))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([*RIGHT, RIGHT[0]], "preds.jsonl:5: the id 's0' stands twice. .* completions"),
        ([*RIGHT, {"id": "s9", "completion": "x"}], "1 of 5 predictions are of no problem of sums: 's9'. Its ids are such as 's0'"),
        ([{"completion": "x"}], "preds.jsonl:1: no `id`"),
        ([{"id": "s0", "output": "x"}], "give `completion` or `completions`, one of the two; the row has: id, output"),
        ([{"id": "s0", "completion": "x", "completions": ["x"]}], "one of the two"),
        ([{"id": "s0", "completions": "x"}], "must be a list, given str"),
        ([{"id": "s0", "completion": 3}], "given int: 3"),
        ([{"id": "s0", "completion": ["a"]}], "given list"),
        ([], "has no rows"),
    ],
)  # fmt: skip
def test_files_that_are_no_predictions(tmp_path, sums, rows, says):
    with pytest.raises(DataError, match=says):
        score_predictions(sums, written(tmp_path, rows), allow_missing=True)


def test_what_can_not_be_judged(tmp_path, sums):
    with pytest.raises(ConfigError, match="does not exist"):
        score_predictions(sums, tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="is a directory"):
        score_predictions(sums, tmp_path)
    for text, says in (('{"per_row": [1]}', "per_row must list objects"), ("[" * 100_000, "not JSON")):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(DataError, match=says):
            score_predictions(sums, tmp_path / "odd.json")
    with pytest.raises(DataError, match="unknown format"):
        score_predictions(sums, written(tmp_path, RIGHT, "preds.csv"))
    chosen = SUMS.replace("boxed", "plain").replace("exact_match", "exact_match\nmode: choices")
    with pytest.raises(ConfigError, match="compares log-probs"):
        score_predictions(own(tmp_path, ROWS, chosen), written(tmp_path, RIGHT))
    code = SUMS.replace("exact_match", "code_tests")
    with pytest.raises(ConfigError, match="allow_code_execution"):
        score_predictions(own(tmp_path, ROWS, code), written(tmp_path, RIGHT))


def test_references_that_the_scorer_can_not_use_are_listed(tmp_path):
    letters = own(
        tmp_path,
        [{**ROWS[0], "answer": "none of these"}, {**ROWS[1], "answer": "B"}],
        SUMS.replace("exact_match", "multiple_choice"),
    )
    result = score_predictions(
        letters, written(tmp_path, [{"id": "s0", "completion": "Answer: A"}, {"id": "s1", "completion": "Answer: B"}])
    )
    assert result.accuracy == 0.5 and result.failures == {"not-applicable": 1}
    assert [bad["id"] for bad in result.to_dict()["unusable_answers"]] == ["s0"]


IFEVAL = """
title: Instructions
data: rows.jsonl
convert: ifeval
prompts: chat
scorer: {function: instructions, isolate: inline}
also:
  loose: {scorer: {function: instructions, isolate: inline, args: {loose: true}}}
  by_instruction: {scorer: {function: instructions, isolate: inline, args: {partial: true}}, weight: instructions}
"""


def test_strict_and_loose_by_prompt_and_by_instruction(tmp_path):
    comma, title, quoted = "punctuation:no_comma", "detectable_format:title", "startend:quotation"
    rows = [
        {"key": 0, "prompt": "p", "instruction_id_list": [comma], "kwargs": [{}]},
        {"key": 1, "prompt": "p", "instruction_id_list": [comma, title, quoted], "kwargs": [{}, {}, {}]},
    ]
    # Without its first line the first has no comma; the second follows one of three.
    said = [{"id": "ifeval/0", "completion": "Sure, here:\nfine"}, {"id": "ifeval/1", "completion": "no comma"}]
    result = score_predictions(own(tmp_path, rows, IFEVAL), written(tmp_path, said))
    found = result.to_dict()
    assert (found["accuracy"], found["also"]["loose"]["value"]) == (0.0, 0.5)
    assert found["also"]["by_instruction"]["value"] == pytest.approx(1 / 4)  # 0 of 1 and 1 of 3
    assert found["mean_reward"] == 0.0  # the others are in no sum with it
    assert result.rows[1]["also"]["by_instruction"] == {"weight": 3, "values": [pytest.approx(1 / 3)]}
    assert "not followed" in result.rows[0]["notes"][0] and result.rows[0]["notes"][0].count("no_comma") == 1


def test_intervals_of_further_numbers():
    def rows(values, weights):
        return [{"also": {"x": {"weight": w, "values": v}}} for v, w in zip(values, weights, strict=True)]

    alike = summary(rows([[1.0], [1.0], [1.0]], [1, 2, 3]))["x"]
    assert alike["value"] == 1.0 and alike["interval"][0] < 0.8 and alike["interval"][1] == 1.0
    weighted = summary(rows([[1.0]] * 30 + [[0.0]] * 30, [1] * 30 + [3] * 30))["x"]
    assert weighted["value"] == 0.25 and 0.1 < weighted["interval"][0] < 0.25 < weighted["interval"][1] < 0.45
    assert summary(rows([[None], [1.0]], [1, 1]))["x"]["value"] == 0.5  # one that failed counts 0
    assert summary(rows([[5.0], [5.0]], [1, 1]))["x"] == {"value": 5.0, "interval": None}
    assert summary([{"id": "a"}]) == {}


def test_completions_for_another_split_are_left_out(tmp_path):
    """MBPP's file holds all splits: who completed all of them is judged on the test split."""
    from llmrl.data.convert import mbpp_task
    from llmrl.evaluation.benchmarks import Benchmark, load_spec

    rows = [{"task_id": i, "prompt": "p", "code": "x", "test_list": ["assert x"]} for i in (2, 11, 12)]
    problems = [mbpp_task(row, 0) for row in rows[1:]]
    benchmark = Benchmark("mbpp", load_spec("mbpp"), problems, "", frozenset({"mbpp/2"}))
    given = {"mbpp/2": ["a", "b", "c"], "mbpp/11": ["a"], "mbpp/12": ["b"]}
    assert matched(benchmark, given) == ([["a"], ["b"]], [])
    with pytest.raises(DataError, match="1 of 4 predictions are of no problem of mbpp: 'mbpp/3'"):
        matched(benchmark, {**given, "mbpp/3": ["x"]})
