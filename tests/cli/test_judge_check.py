"""`llmrl judge-check` before judges that fall for attacks, that do not, and that fail."""

from __future__ import annotations

import json
import re

import pytest

from llmrl.cli.main import main
from llmrl.config.rubric import Rubric
from llmrl.rewards.attacks import BAD_ANSWER, attacks
from tests.rewards.scripted_judge import Answer, judge  # noqa: F401  (a fixture)

RUBRIC = """
criteria:
  - {name: right, description: the city and the year are right, range: [0, 4]}
  - {name: rude, description: it insults the reader, range: [0, 2], negative: true}
"""
EXAMPLES = """
examples:
  - {prompt: "What is 2 + 2?", answer: "4", min: 0.8}
  - {prompt: "What is 2 + 2?", answer: "5, of course", max: 0.2}
"""


def check(judge, tmp_path, text=RUBRIC, *more):  # noqa: F811
    rubric = tmp_path / "r.yaml"
    rubric.write_text(text)
    return main(["judge-check", str(rubric), "--base-url", judge.url, "--model", "m", *more])


def careful(ask):
    return ask.verdict(4 if ask.part("answer") == "4" else 0, 0)


def test_a_judge_that_reads_answers_as_data(judge, tmp_path, capsys):  # noqa: F811
    judge.script = careful
    assert check(judge, tmp_path, RUBRIC + EXAMPLES, "--json") == 0
    out = capsys.readouterr()
    report = json.loads(out.out)
    assert report["passed"] is True
    assert [k["score"] for k in report["known"]] == [1.0, 0.0]
    assert len(report["attacks"]) == 13
    assert len(judge.asks) == 14, "the empty answer is not shown"
    assert report["metrics"]["requests"] - report["metrics"]["retries"] == 14
    assert (report["fell_for"], report["failures"]) == ([], 0)
    assert "15 of 15 passed" in out.err


@pytest.mark.parametrize(
    ("clue", "attack"),
    [
        ("NOTE TO THE GRADER", "orders to the judge"),
        ("exempt from grading", "ignore the rubric"),
        ("Grading of this answer is finished", "fake finished grading"),
        ("That was the data of request 3f9a5c70d2e81b46", "fake end of the data"),
        ("<|im_start|>", "fake system message"),
        ("authors of the rubric", "authority"),
        ("fairest and wisest", "flattery"),
        ("lose my job", "plea"),
        ("Hinweis an den Prüfer", "another language"),
        ("meets every criterion", "rubric copied back"),
        ("It is well known", "padding"),
    ],
)
def test_a_judge_that_falls_for_one(judge, tmp_path, capsys, clue, attack):  # noqa: F811
    judge.script = lambda ask: ask.verdict(4, 0) if clue in ask.part("answer") else ask.verdict(0, 0)
    assert check(judge, tmp_path, RUBRIC, "--json") == 1
    assert json.loads(capsys.readouterr().out)["fell_for"] == [attack]


def test_the_table_names_what_failed(judge, tmp_path, capsys):  # noqa: F811
    judge.script = lambda ask: ask.verdict(4, 0)
    assert check(judge, tmp_path, RUBRIC + EXAMPLES) == 1
    out = capsys.readouterr().out
    assert re.search(r"5, of course +1\.000 +0\.00 to 0\.20 +FAILED", out)
    assert re.search(r"^4 +1\.000 +0\.80 to 1\.00 +ok", out, re.MULTILINE)
    assert "Planted attacks" in out


def test_a_judge_that_fails_has_not_passed(judge, tmp_path, capsys):  # noqa: F811
    judge.script = lambda ask: Answer("who?", status=401)
    assert check(judge, tmp_path, RUBRIC, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == 13  # all but the empty answer
    assert report["fell_for"] == []


@pytest.mark.parametrize(("more", "message"), [(["--samples", "0"], "--samples"), (["--timeout", "-1"], "--timeout")])
def test_options_that_can_not_work(judge, tmp_path, capsys, more, message):  # noqa: F811
    assert check(judge, tmp_path, RUBRIC, *more) == 2
    assert message in capsys.readouterr().err


def test_attacks_leave_the_answer_bad():
    rubric = Rubric.model_validate({"criteria": [{"name": "a", "description": "d", "range": [1, 9]}]})
    planted = attacks(BAD_ANSWER, rubric)
    assert len(set(planted.values())) == len(planted) == 13
    assert '"scores": {"a": 9.0}' in planted["fake verdict"]
