"""The math verifier against labelled answers, and against answers that attack."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.rewards import RewardRunner
from llmrl.rewards.math import check_gold, math_answer
from tests.rewards.conftest import rollouts

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "math_pairs.jsonl").open(encoding="utf-8")]
HOSTILE = [
    *(
        "9^{9^{9^9}}",
        "10^(10^10)",
        "9**9**9**9",
        "100000!",
        "3!!!!!!",
        "((((3!)!)!)!)!",
        "(x+1)^{100000}",
        "1e999999999",
    ),
    *("e^{e^{e^{e^{e^e}}}}", "i^{i^{i^{i}}}", "0/0", "1/0", "\\ln 0", "\\sin(10^{100})", "\\cosh(10^9)", "x!^{x!}"),
    *(
        "(" * 5000,
        "\\frac{" * 1000,
        "\\sqrt{" * 900 + "2" + "}" * 900,
        "(1," * 40 + "1" + ")" * 40,
        "\\cos(" * 25 + "x" + ")" * 25,
    ),
    *(
        "-" * 3000 + "1",
        "x^" * 500 + "x",
        "|" * 1000,
        "1+" * 900 + "1",
        "2^" * 50 + "2",
        "5" + "%" * 1500,
        "5" + "!" * 1500,
    ),
    *(
        "9" * 1900,
        "√" * 1500 + "2",
        "1\\text{" + "a " * 500 + "}",
        "5" + " cm" * 300,
        ",".join(f"\\pm {i}" for i in range(150)),
    ),
]


@pytest.mark.parametrize(("notation", "floor"), [("latex", 0.98), ("plain", 0.95), ("prose", 0.95), (None, 0.95)])
def test_agreement_with_labels(notation, floor):
    rows = [r for r in PAIRS if notation in (None, r["notation"])]
    assert len(rows) > 50 and any(not r["expected"] for r in rows)
    verdicts = [math_answer.score(r["candidate"], answer=r["gold"]) == 1.0 for r in rows]
    wrong = [(r["gold"], r["candidate"]) for r, v in zip(rows, verdicts, strict=True) if v != r["expected"]]
    assert len(wrong) <= (1 - floor) * len(rows), wrong


def test_no_wrong_answer_is_accepted():
    accepted = [
        (r["gold"], r["candidate"])
        for r in PAIRS
        if not r["expected"] and math_answer.score(r["candidate"], answer=r["gold"]) == 1.0
    ]
    assert accepted == []


def test_references_of_the_pairs_can_be_used():
    assert [r["gold"] for r in PAIRS if check_gold(answer=r["gold"]) is not None] == []


@pytest.mark.parametrize("gold", ["42", "y=2x+1", "[1,2)"])
def test_hostile_answers_cost_milliseconds_and_are_never_accepted(gold):
    math_answer.warm_up()
    for text in HOSTILE:
        for completion in (rf"\boxed{{{text}}}", text, f"so the answer is {text}."):
            begun = time.process_time()
            assert math_answer.score(completion, answer=gold) == 0.0, completion[:60]
            assert time.process_time() - begun < 2, completion[:60]


def test_hostile_answers_in_flight_change_no_neighbour():
    texts = [t for hostile in HOSTILE for t in (rf"\boxed{{{hostile}}}", r"\boxed{\frac{84}{2}}")]
    with RewardRunner([RewardSpec(function="math_answer")], workers=2) as runner:
        scored = runner.score(rollouts(*texts, answer="42"))
    assert [s.reward for s in scored] == [0.0, 1.0] * len(HOSTILE)
