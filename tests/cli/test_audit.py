"""`llmrl audit-verifier`: labelled answers in, agreement out."""

from __future__ import annotations

import json

import pytest

from llmrl.cli.main import main

ROWS = [
    {"gold": "1/2", "candidate": r"$\frac{2}{4}$", "expected": True, "source": "ignored"},
    {"gold": r"\boxed{1/2}", "completion": "so the answer is 0.5.", "correct": 1},
    {"gold": "1/2", "candidate": "2", "expected": False},
    {"gold": "1/2", "candidate": "0.5", "expected": False},
    {"gold": 7, "candidate": "8", "expected": "true"},
]


def write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_json_is_the_last_line_and_alone_on_standard_output(tmp_path, capsys):
    assert main(["audit-verifier", write(tmp_path, *ROWS), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert len(out.splitlines()) == 1
    assert {k: report[k] for k in ("agreement", "precision", "recall", "timeouts", "rows")} == {
        "agreement": 0.6, "precision": 2 / 3, "recall": 2 / 3, "timeouts": 0, "rows": 5,
    }  # fmt: skip
    assert [(d["line"], d["accepted"]) for d in report["disagreements"]] == [(4, True), (5, False)]
    assert "line 5: not accepted, but labelled right" in err


def test_odd_rows_are_rows(tmp_path, capsys):
    """No answer, an empty reference, thoughts before the answer, both forms and columns of one's own in one file."""
    rows = [
        {"gold": "1/2", "candidate": None, "expected": False},
        {"gold": "1/2", "candidate": "", "expected": 0},
        {"gold": "", "candidate": "1", "expected": True},
        {"gold": 0.5, "candidate": "1/2", "expected": 1, "meta": {"a": [1]}},
        {"gold": "7", "completion": "<think>\n\\boxed{8}?\n</think>\nIt is \\boxed{7}.", "correct": "true", "candidate": None},
        {"gold": True, "candidate": "true", "expected": "yes"},
        {"gold": None, "candidate": "2", "expected": True},
    ]  # fmt: skip
    assert main(["audit-verifier", write(tmp_path, *rows), "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    refused = [(d["line"], d["accepted"], d["outcome"]) for d in report["disagreements"]]
    assert refused == [(3, False, "not-applicable"), (7, False, "not-applicable")]
    assert (report["precision"], report["recall"], report["unusable"]) == (1.0, 0.6, [3, 7])
    assert "2 rows (lines 3, 7)" in err


def test_the_text_lists_disagreements(tmp_path, capsys):
    assert main(["audit-verifier", write(tmp_path, *ROWS), "--verifier", "exact_match"]) == 0
    out = capsys.readouterr().out
    assert "line 1: not accepted, but labelled right" in out and "exact_match on 5 rows: agreement 0.4" in out


def test_a_timeout_is_not_accepted(tmp_path, capsys):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom llmrl.rewards import row_verifier\n\n\n@row_verifier\ndef slow(completion, answer):\n"
        "    time.sleep(30 if completion == 'hang' else 0)\n    return 1.0\n"
    )
    rows = [{"gold": "1", "candidate": c, "expected": True} for c in ("hang", "1")]
    argv = [
        "audit-verifier",
        write(tmp_path, *rows),
        "--verifier",
        f"{tmp_path}/slow.py:slow",
        "--timeout",
        "0.5",
        "--json",
    ]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["timeouts"], report["agreement"], report["precision"], report["recall"]) == (1, 0.5, 1.0, 0.5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((ROWS[0], "{not json"), "line 2 is not JSON"),
        ((ROWS[0], "", {"gold": "1", "answer": "1"}), "line 3 has the columns answer, gold; a row needs"),
        (("[1]",), "line 1 holds a list"),
        (({"gold": "1", "candidate": "1", "expected": "maybe"},), "`expected` is 'maybe'; a label is true or false"),
        (({"gold": [1], "candidate": "1", "expected": True},), "are texts or numbers"),
        ((), "has no rows"),
    ],
)
def test_bad_files_are_explained(tmp_path, capsys, lines, message):
    assert main(["audit-verifier", write(tmp_path, *lines)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_and_an_unknown_verifier(tmp_path, capsys):
    assert main(["audit-verifier", str(tmp_path / "no.jsonl")]) == 2
    assert "can't be read" in capsys.readouterr().err
    assert main(["audit-verifier", write(tmp_path, *ROWS), "--verifier", "math_anser"]) == 2
    assert "Did you mean math_answer" in capsys.readouterr().err
