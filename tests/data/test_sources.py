"""Reading files, renaming columns, mixing sources."""

from __future__ import annotations

import gzip
import json

import pytest

from llmrl.config.data import DatasetSource
from llmrl.data.sources import Row, load_rows, rows_from
from llmrl.errors import DataError

RECORDS = [{"prompt": f"p{i}", "completion": f"c{i}", "n": i} for i in range(20)]


def jsonl(records):
    return "".join(json.dumps(r) + "\n" for r in records)


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if name.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif name.endswith(".gz"):
            path.write_bytes(gzip.compress(content.encode()))
        else:
            path.write_text(content, encoding="utf-8")
        return str(path)

    return write


def load(path, seed=0, **source):
    return load_rows([DatasetSource(path=path, **source)], seed=seed)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(RECORDS)),
        ("a.jsonl.gz", jsonl(RECORDS)),
        ("a.json", json.dumps(RECORDS, indent=1)),
        ("a.json.gz", json.dumps(RECORDS)),
        ("a.json", jsonl(RECORDS)),
        ("bom.jsonl", "\ufeff" + jsonl(RECORDS)),
        ("a.parquet", RECORDS),
    ],
)
def test_formats(file, name, content):
    path = file(name, content)
    rows = load(path)
    assert [dict(r.values) for r in rows] == RECORDS
    assert rows[2].origin == f"{path}:3"


def test_line_numbers_count_blank_lines_and_lines_end_at_newlines_only(file):
    path = file("a.jsonl", '{"text": "a\u2028b"}\n\n{"text": "c"}\n')
    assert [(r.values["text"], r.origin) for r in load(path)] == [("a\u2028b", f"{path}:1"), ("c", f"{path}:3")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: a row must be a JSON object, got list"),
        ("a.json", "[1, 2]", "a.json:1: a row must be a JSON object, got int"),
        ("a.json", '{"data":\n []}', "a.json:1: not JSON"),
        ("a.jsonl", "", "has no rows"),
        ("a.csv", "a,b\n", r"unknown format; give one of \.json"),
        ("a.parquet.jsonl.parquet", [], "has no rows"),
    ],
)
def test_bad_files(file, name, content, message):
    with pytest.raises(DataError, match=message):
        load(file(name, content))


def test_damaged_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    for name in ("a.jsonl.gz", "a.parquet", "a.jsonl"):
        with pytest.raises(DataError, match=f"{name} can't be read"):
            load(str(tmp_path / name))


def test_a_missing_file_and_a_missing_hub_dataset():
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        load("nowhere.jsonl")
    with pytest.raises(DataError, match=r"dataset no-such/thing\[test\] can't be loaded"):
        load("no-such/thing", split="test")


def test_a_file_has_no_split(file):
    with pytest.raises(DataError, match="it has no `name` and no `split`"):
        load(file("a.jsonl", jsonl(RECORDS)), split="test")


def test_hub_rows_come_from_datasets(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, name, *, split):
        calls.append((path, name, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load("org/data", name="main", split="test", max_rows=3)
    assert calls == [("org/data", "main", "test")] and len(rows) == 3
    assert all(r.values == RECORDS[r.values["n"]] and r.origin == f"org/data[test]:{r.values['n'] + 1}" for r in rows)
    assert len(load("org/data")) == 20


def test_columns_and_templates(file):
    path = file("a.jsonl", jsonl([{"question": "1+1?", "solution": "two", "answer": 2}]))
    (row,) = load(path, columns={"prompt": "question", "completion": "solution"})
    assert dict(row.values) == {"prompt": "1+1?", "completion": "two", "answer": 2}
    (row,) = load(path, prompt_template="Q: {question}\nA:", completion_template=r" {solution} \boxed{{{answer}}}")
    assert row.values["prompt"] == "Q: 1+1?\nA:" and row.values["completion"] == r" two \boxed{2}"
    assert row.values["question"] == "1+1?"
    (row,) = load(path, columns={"q": "question"}, prompt_template="{q}{question}")
    assert row.values["prompt"] == "1+1?1+1?"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"columns": {"prompt": "query"}},
            r"a.jsonl:1: no column 'query', which `columns: {prompt: query}` needs; columns: question",
        ),
        ({"prompt_template": "{query}"}, "no column 'query', which prompt_template needs"),
        ({"prompt_template": "{none}"}, "column 'none' is null"),
        ({"completion_template": r"\boxed{}"}, "literal brace twice"),
        ({"completion_template": "{question.x}"}, "not a column name"),
        ({"completion_template": "{"}, "literal brace twice"),
    ],
)
def test_bad_columns_and_templates(file, source, message):
    path = file("a.jsonl", jsonl([{"question": "q", "none": None}]))
    with pytest.raises(DataError, match=message):
        load(path, **source)


def test_max_rows_are_chosen_by_seed_and_keep_their_order(file):
    path = file("a.jsonl", jsonl(RECORDS))
    chosen = [[r.values["n"] for r in load(path, seed=s, max_rows=8)] for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] == sorted(chosen[0]) and len(set(chosen[0])) == 8
    assert chosen[0] != chosen[2] and chosen[0] != list(range(8))
    assert len(load(path, max_rows=100)) == 20


def test_mixture_is_the_largest_at_its_shares_without_repeats(file):
    a, b = file("a.jsonl", jsonl(RECORDS)), file("b.jsonl", jsonl([{"m": i} for i in range(100)]))
    sources = [DatasetSource(path=a, weight=1), DatasetSource(path=b, weight=3)]
    rows = load_rows(sources, seed=4)
    ours, theirs = [r for r in rows if "n" in r.values], [r.values["m"] for r in rows if "m" in r.values]
    assert len(ours) == 20 and len(theirs) == len(set(theirs)) == 60 and theirs != list(range(60))
    assert (
        [r.origin for r in load_rows(sources, seed=4)]
        == [r.origin for r in rows]
        != [r.origin for r in load_rows(sources, seed=5)]
    )
    assert len(load_rows([DatasetSource(path=a), DatasetSource(path=b)])) == 120
    with pytest.raises(DataError, match=r"have a weight, but not .*b\.jsonl"):
        load_rows([sources[0], DatasetSource(path=b)])


def test_rows_from_python():
    import datasets

    assert [r.values for r in rows_from(RECORDS)] == RECORDS
    assert [r.values for r in rows_from(datasets.Dataset.from_list(RECORDS))] == RECORDS
    assert [r.values for r in rows_from(r for r in RECORDS)] == RECORDS
    rows = [Row({"text": "a"}, "x:1")]
    assert rows_from(rows) == rows
    assert rows_from(RECORDS)[3].origin == "dataset[3]"


@pytest.mark.parametrize("data", ["file.jsonl", 3, {"train": RECORDS}, [RECORDS], None])
def test_rows_from_refuses(data):
    with pytest.raises(DataError, match="dataset"):
        rows_from(data)


RECORD = {
    "id": "s/1", "source": "S", "messages": [{"role": "user", "content": "1+1?"}], "answer": "2", "verifier": "math_answer",
    "meta": {"level": 3, "solution": "one and one"},
}  # fmt: skip


def test_records_become_columns(file):
    path = file("r.jsonl", jsonl([RECORD]))
    row = load(path)[0].values
    assert row == {
        "id": "s/1", "source": "S", "answer": "2", "verifier": "math_answer", "level": 3, "solution": "one and one",
        "prompt": RECORD["messages"], "question": "1+1?",
    }  # fmt: skip
    assert load(path, columns={"prompt": "question"})[0].values["prompt"] == "1+1?"
    row = load(path, prompt_template="Q: {question}\n", completion_template=" {solution}\n#### {answer}")[0].values
    assert (row["prompt"], row["completion"]) == ("Q: 1+1?\n", " one and one\n#### 2")
    assert [dict(r.values) for r in load_rows([DatasetSource(path=path)], raw=True)] == [RECORD]
    assert dict(rows_from([RECORD])[0].values)["prompt"] == RECORD["messages"]


def test_the_choices_are_part_of_the_prompt():
    choices = [{"label": "A", "text": "one"}, {"label": "B", "text": "two"}]
    record = {**RECORD, "answer": "B", "verifier": "multiple_choice", "meta": {"choices": choices}}
    row = rows_from([record])[0].values
    assert row["question"] == row["prompt"][-1]["content"] == "1+1?\n\nA. one\nB. two"
    assert row["choices"] == choices and RECORD["messages"] == [{"role": "user", "content": "1+1?"}]


def test_a_record_of_a_conversation_is_learned_from():
    said = [*RECORD["messages"], {"role": "assistant", "content": "2"}]
    row = rows_from([{**RECORD, "messages": said, "answer": "", "verifier": ""}])[0].values
    assert row["messages"] == said and "prompt" not in row


@pytest.mark.parametrize("name", ["answer", "prompt", "completion", "question", "id"])
def test_meta_can_t_replace_a_column(name):
    with pytest.raises(DataError, match=rf"dataset\[0\]: `meta` has the key '{name}'.*rename it"):
        rows_from([{**RECORD, "meta": {name: "x"}}])


def test_rows_of_open_instruct_are_read_unchanged():
    asked = RECORD["messages"]
    row = rows_from([{"messages": asked, "ground_truth": "72", "dataset": "gsm8k"}])[0].values
    assert (row["prompt"], row["answer"], row["verifier"], row["dataset"]) == (asked, "72", "gsm8k", "gsm8k")
    said = [*asked, {"role": "assistant", "content": "?"}]
    row = rows_from([{"messages": said, "ground_truth": [["assert f()"]], "dataset": ["code"]}])[0].values
    assert (row["prompt"], row["answer"], row["verifier"]) == (asked, ["assert f()"], "code")
    with pytest.raises(DataError, match="names 2 verifiers"):
        rows_from([{"messages": asked, "ground_truth": ["a", "b"], "dataset": ["math", "code"]}])
