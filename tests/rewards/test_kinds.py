"""The built-in rewards for texts, choices, sets, lengths, structure and languages, beyond the examples in reward_functions/."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.errors import ConfigError, RewardError
from llmrl.rewards import RewardRunner
from llmrl.rewards.choice import multiple_choice
from llmrl.rewards.format import code_format, sections
from llmrl.rewards.language import bleu, language_consistency
from llmrl.rewards.length import length, length_zscore
from llmrl.rewards.structure import diff_similarity, json_schema, read_clauses, sat_assignment
from llmrl.rewards.text import keyword_count, reasoning_steps, set_fbeta, text_f1, text_match
from tests.rewards.conftest import rollout, rollouts


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"), ("**Answer: B**", "B"), (r"\boxed{B}", "B"), (r"so \boxed{\text{B}}", "B"), (r"Final answer: $\textbf{(B)}$", "B"), ("B", "B"),
        ("thinking about A and C\n\nB)", "B"), ("<think>the answer is A</think>The best answer is B", "B"), ("B. Lyon", "B"),
        ("<answer>Lyon</answer>", "B"), ("Option B", "B"), ("Answer: 2", "B"), ("answer: (b) Lyon", "B"),
        ("A is wrong. The answer is B, not C.", "B"),
        ("The answer is A", None), ("Best", None), ("", None), ("A B", None), ("Answer: Bordeaux", None), ("I don't know", None),
        ("<think>The answer is (B)", None), ("Answer: E", None),
    ],
)  # fmt: skip
def test_multiple_choice(text, letter):
    choices = ["Paris", "Lyon", "Nice", "Metz"]
    assert multiple_choice.score(text, "B", choices) == float(letter == "B")
    assert multiple_choice.score(text, "Lyon", {"text": choices, "label": ["1", "2", "3", "4"]}) == float(letter == "B")


def test_a_choice_that_is_none_gives_no_reward():
    for answer in (None, "", "Rome", "F"):
        assert multiple_choice.score("B", answer, ["Paris", "Lyon"]) is None
        assert "no choice" in multiple_choice.check_gold(answer=answer, choices=["Paris", "Lyon"])


def test_texts():
    assert text_match.score("<think>Rome</think> The  NAÏVE  one!", "naïve one") == 1.0
    assert text_match.score("Answer: A", "A") == 1.0 and text_match.score("Answer: B", "A") == 0.0
    assert text_match.score("smiles", "mile", within=True) == 0.0
    assert text_f1.score("x x y", "x y y") == pytest.approx(2 / 3) and text_f1.score("x", ["y", "x"]) == 1.0
    for f in (text_match, text_f1):
        assert f.score("x", None) is None and f.score("x", " . ") is None and "no text" in f.check_gold(answer=None)


def test_set_fbeta_is_the_formula():
    rng = random.Random(0)
    for _ in range(50):
        gold, given = (rng.sample("bcdefgh", rng.randint(1, 5)) for _ in range(2))
        beta, both = rng.choice([0.5, 1.0, 2.0]), len(set(gold) & set(given))
        p, r = both / len(given), both / len(gold)
        wanted = (1 + beta**2) * p * r / (beta**2 * p + r) if both else 0.0
        assert set_fbeta.score("Answer: " + ", ".join(given), gold, beta=beta) == pytest.approx(wanted)
    assert set_fbeta.score("x", None) is None and "no item" in set_fbeta.check_gold(answer=[])


def test_keywords_and_steps():
    assert keyword_count.score("C++ and c", keywords=["c++", "C"]) == 1.0
    assert keyword_count.score("waiting", keywords=["wait"], whole_words=False) == 1.0
    assert reasoning_steps.score("Step 1: a\nb\n2. c\n- d\nFirst, e", wanted=5) == 0.8
    assert reasoning_steps.score("") == 0.0 and reasoning_steps.score("Stepping - 1.5") == 0.0


def test_lengths():
    sizes = [50, 80, 100, 120, 150]
    between = [length.score([7] * n, target=80, upper=120, kind="between") for n in sizes]
    assert between == pytest.approx([-30 / 80, 0, 0, 0, -30 / 80])
    prompts, ids = ["p", "q", "p", "p", "q"], [[7] * n for n in sizes]
    got = length_zscore(prompts, ids)
    mean, std = statistics.fmean([50, 100, 120]), statistics.pstdev([50, 100, 120])
    assert got == pytest.approx([(mean - 50) / std, 1.0, (mean - 100) / std, (mean - 120) / std, -1.0])
    assert math.fsum(got) == pytest.approx(0, abs=1e-12)


def test_sections_and_code():
    names = ["Plan", "Answer"]
    assert sections.score("## plan:\nx\n**Answer**: 4", names=names) == 1.0
    assert sections.score("# Answer\n4\n# Plan\nx", names=names, ordered=False) == 1.0
    assert sections.score("# Plan\nx\n# Plan\ny\n# Answer\n4", names=names) == 0.5  # twice is not once
    assert code_format.score("<think>```python\nx\n```</think>\nno") == 0.0
    assert code_format.score("a\n```python\nx\n```\nb") == 1.0 and code_format.score("```cpp\nx\n```") == 0.0
    assert code_format.score("```python\nx") == 0.0 and code_format.score("", language="c++") == 0.0


def test_json_schemas():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"]}
    assert json_schema.score('<think>x</think><answer>{"a": 1}</answer>', json.dumps(schema)) == 1.0
    assert json_schema.score("{}", schema) == 0.0 and json_schema.score('{"a": 1}', {"type": "wrong"}) is None
    assert "no JSON schema" in json_schema.check_gold(json_schema={"type": "wrong"})
    assert json_schema.check_gold(json_schema=None) and json_schema.check_gold(schema=schema) is None
    with pytest.raises(ConfigError, match="no JSON schema"):
        RewardRunner([RewardSpec(function="json_schema", args={"schema": {"type": "wrong"}})])


def test_satisfaction_by_brute_force():
    rng = random.Random(0)
    for _ in range(50):
        clauses = [[rng.choice([1, -1]) * rng.randint(1, 4) for _ in range(3)] for _ in range(rng.randint(1, 9))]
        values = [rng.random() < 0.5 for _ in range(4)]
        share = sum(any(values[abs(n) - 1] == (n > 0) for n in c) for c in clauses) / len(clauses)
        named = ", ".join(f"x{i + 1}={v}" for i, v in enumerate(values))
        literals = " ".join(str(i + 1 if v else -i - 1) for i, v in enumerate(values))
        for text in (named, f"v {literals} 0"):
            assert sat_assignment.score(text, clauses, partial=True) == share
            assert sat_assignment.score(text, clauses) == float(share == 1)


@pytest.mark.parametrize("clauses", [None, [], "", [[0]], [["1"]], [1], "1 2 x", [[True]]])
def test_clauses_that_are_none(clauses):
    assert sat_assignment.score("1", clauses) is None
    assert "must be lists of whole numbers" in sat_assignment.check_gold(clauses=clauses) or clauses == "1 2 x"
    with pytest.raises(ValueError):
        read_clauses(clauses)


def test_diffs():
    gold = "--- a\n+++ b\n@@ -1 +1 @@\n-x\n+y\n"
    assert diff_similarity.score(gold.replace("@@ -1 +1 @@", "@@ -9 +9 @@\n context"), gold) == 1.0
    assert diff_similarity.score("nothing", gold, malformed=0.0) == 0.0 and diff_similarity.score(gold, "text") is None
    assert "no unified diff" in diff_similarity.check_gold(answer="text")


def test_languages_and_what_is_absent(monkeypatch):
    assert language_consistency.score("東京タワーへ行く", language="ja") == 1.0
    assert language_consistency.score("naïve été", language="fr") == 1.0
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    for call in (lambda: bleu.score("a", "a"), lambda: json_schema.score("{}", schema={})):
        with pytest.raises(RewardError, match=r"pip install 'llmrl\[graders\]'"):
            call()
    assert "llmrl[graders]" in bleu.check_gold(answer="a") and "llmrl[graders]" in json_schema.check_gold(
        json_schema={}
    )


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("length", {"target": 5, "kind": "between"}),
        ("length", {"target": 5, "upper": 9}),
        ("length", {"target": 5, "upper": 3, "kind": "between"}),
        ("set_fbeta", {"beta": 0.0}),
        ("keyword_count", {"keywords": "word"}),
        ("sections", {"names": []}),
        ("language_consistency", {"language": "English"}),
        ("sections", {}),
    ],
)
def test_arguments_that_can_not_work(name, args):
    with pytest.raises(ConfigError):
        RewardRunner([RewardSpec(function=name, args=args)])


def test_by_name_in_a_recipe():
    specs = [
        RewardSpec(function="multiple_choice"),
        RewardSpec(function="text_f1"),
        RewardSpec(function="length_zscore"),
        RewardSpec(function="keyword_count", args={"keywords": ["answer"]}),
    ]
    rows = [rollout("The answer is B", 0, ids=(1,), answer="B"), rollout("no", 0, ids=(1, 2, 3), answer="B")]
    with RewardRunner(specs, workers=1) as runner:
        first, second = runner.score(rows)
    assert first.parts == {"multiple_choice": 1.0, "text_f1": 1.0, "length_zscore": 1.0, "keyword_count": 1.0}
    assert second.parts == {"multiple_choice": 0.0, "text_f1": 0.0, "length_zscore": -1.0, "keyword_count": 0.0}


@pytest.mark.parametrize(
    "text", ["(", "[", "answer is ", "x1=", "```\n", "- ", "1.", "\n", "**", "<answer>", "A ", "é", "{", " "]
)
def test_hostile_texts_cost_little(text):
    hostile, begun = text * 50_000, time.monotonic()
    for score in (
        lambda t: multiple_choice.score(t, "B"),
        lambda t: text_match.score(t, "b", within=True),
        lambda t: text_f1.score(t, "b"),
        lambda t: set_fbeta.score(t, "b, c"),
        lambda t: keyword_count.score(t, keywords=["b"]),
        lambda t: reasoning_steps.score(t),
        lambda t: sections.score(t, names=["b"]),
        lambda t: code_format.score(t),
        lambda t: sat_assignment.score(t, [[1]]),
        lambda t: language_consistency.score(t, language="en"),
        lambda t: diff_similarity.score(t, "+b"),
    ):
        score(hostile)
    assert time.monotonic() - begun < 20  # about 1 s


def test_rollouts_without_the_column_are_named():
    with RewardRunner([RewardSpec(function="sat_assignment")]) as runner, pytest.raises(ConfigError, match="'clauses'"):
        runner.score(rollouts("1"))
