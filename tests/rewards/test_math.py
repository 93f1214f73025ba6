"""The math verifier and exact match: what counts as the final answer, and as equal."""

from __future__ import annotations

import json
import time

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.rewards import RewardRunner
from llmrl.rewards.answer import last_boxed, number_of
from llmrl.rewards.exact import exact_match
from llmrl.rewards.math import check_gold, math_answer
from llmrl.rewards.math_guard import too_large_expression, too_large_text
from llmrl.types import Prompt
from tests.conftest import shared_data
from tests.rewards.conftest import rollout, rollouts

CASES = [
    # what counts as the answer
    (r"so \boxed{42}", "42", 1),
    (r"\boxed{1} then \boxed{2}", "2", 1),
    (r"\boxed{2} then \boxed{1}", "2", 0),
    (r"\boxed{\frac{1}{\sqrt{4}}}", "0.5", 1),
    ("<answer>42</answer>", "42", 1),
    ("<answer>41</answer> 42", "42", 0),
    ("Answer: $\\frac{1}{2}$.", "0.5", 1),
    ("**Answer:** 42", "42", 1),
    ("The answer is 42.", "42", 1),
    ("#### 1,234", "1234", 1),
    ("12 + 30 = 42", "42", 1),
    ("42 then 43", "42", 0),
    ("it is -5", "-5", 1),
    ("version 1.2.3", "3", 0),
    ("", "42", 0),
    (r"\boxed{42", "42", 0),
    (r"\boxed{}", "42", 0),
    # numbers
    (r"\boxed{073}", "73", 1),
    (r"\boxed{\textbf{(073)}}", "73", 1),
    (r"\boxed{27.0}", "27", 1),
    (r"\boxed{1,000}", "1000", 1),
    (r"\boxed{1{,}000}", "1000", 1),
    (r"\boxed{\$18}", "18", 1),
    (r"\boxed{1.5e3}", "1500", 1),
    (r"\boxed{50\%}", "50", 1),
    (r"\boxed{50\%}", "0.5", 1),
    (r"\boxed{12\text{ km}}", "12", 1),
    (r"\boxed{5 apples}", "5", 1),
    (r"\boxed{5 million}", "5", 0),
    (r"\boxed{5\text{ million}}", "5000000", 1),
    (r"\boxed{90^\circ}", "90", 1),
    (r"\boxed{5\pi}", "5", 0),
    (r"\boxed{5x}", "5", 0),
    (r"\boxed{-5}", "5", 0),
    (r"\boxed{0.333333}", r"\frac{1}{3}", 1),
    (r"\boxed{0.33}", r"\frac{1}{3}", 0),
    # mathematics
    (r"\boxed{\frac{2}{4}}", "0.5", 1),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}", 1),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1),
    (r"\boxed{(1,2)}", "(1, 2)", 1),
    (r"\boxed{(2,1)}", "(1, 2)", 0),
    (r"\boxed{\{1,2\}}", r"\{2,1\}", 1),
    (r"\boxed{[0,1)}", "[0,1)", 1),
    (r"\boxed{[0,1]}", "[0,1)", 0),
    (r"\boxed{x=5}", "5", 1),
    (r"\boxed{c + a + b}", "a + b + c", 1),
    (r"\boxed{2^{10}}", "1024", 1),
    (r"\boxed{5!}", "120", 1),
    (r"\boxed{(2^3)^5}", "32768", 1),
    (r"\boxed{\text{Yes}}", "Yes", 1),
    (r"\boxed{B}", r"\text{(B)}", 1),
    # answers that hedge
    (r"\boxed{42 \text{ or } 43}", "42", 0),
    (r"\boxed{41,42}", "42", 0),
    ("Answer: 41 or 42", "42", 0),
    # answers that attack
    (r"\boxed{9^{9^{9^9}}}", "42", 0),
    (r"\boxed{-9^{9^{9^9}}}", "42", 0),
    (r"\boxed{(9^{9^{9^9}}, 1)}", "42", 0),
    (r"\boxed{\sqrt{10^{10^{10}}}}", "42", 0),
    (r"\boxed{100000!}", "42", 0),
    (r"\boxed{((((3!)!)!)!)!}", "42", 0),
    (r"\boxed{\binom{10^9}{5\cdot 10^8}}", "42", 0),
    (r"\boxed{\prod_{i=1}^{10^9} i}", "42", 0),
    (r"\boxed{(x+1)^{100000}}", "42", 0),
    (r"\boxed{e^{e^{e^{e^{e^{e}}}}}}", "42", 0),
    (r"\boxed{" + "(" * 5000 + "}", "42", 0),
    (r"\boxed{" * 20_000, "42", 0),
    ("{" * 100_000, "42", 0),
    ("9" * 100_000, "42", 0),
    ("answer" * 20_000, "42", 0),
    ("$" * 100_000, "42", 0),
    (r"\boxed{\text{nan}}", "42", 0),
    (r"\boxed{1/0}", "42", 0),
]


@pytest.mark.parametrize(("text", "gold", "expected"), CASES, ids=lambda v: str(v)[:40])
def test_math_answer(text, gold, expected):
    math_answer.warm_up()
    begun = time.process_time()
    assert math_answer.score(text, answer=gold) == expected
    assert time.process_time() - begun < 5, "hostile answers are refused, not computed"


@pytest.mark.parametrize(("text", "gold", "expected"), CASES, ids=lambda v: str(v)[:40])
def test_exact_match_is_never_more_lenient_and_always_quick(text, gold, expected):
    begun = time.process_time()
    assert exact_match.score(text, answer=gold) <= expected
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("columns", "column", "expected"),
    [
        ({"answer": "4", "solution": r"\boxed{5}"}, None, "4"),
        ({"answer": None, "solution": r"so \boxed{4}"}, None, "4"),
        ({"solution": "2+2=4\n#### 4"}, None, "4"),
        ({"solution": r"$\frac{8}{2}$"}, None, "4"),
        ({"answer": 4}, None, "4"),
        ({"answer": 4.0}, None, "4"),
        ({"target": "4", "answer": "5"}, "target", "4"),
    ],
)
def test_where_the_reference_is(columns, column, expected):
    assert math_answer.score(rf"\boxed{{{expected}}}", column=column, **columns) == 1.0
    assert check_gold(column=column, **columns) is None


@pytest.mark.parametrize(
    "columns",
    [
        *[{}, {"answer": ""}, {"answer": None}, {"answer": "$$"}, {"answer": ["4"]}, {"answer": True}],
        *[{"solution": "First we add.\nThen we are done."}, {"answer": r"\frac{1}{"}, {"answer": "\\boxed{}"}],
    ],
)
def test_a_reference_that_can_not_be_used_gives_no_reward(columns):
    assert check_gold(**columns)
    assert math_answer.score(r"\boxed{4}", **columns) is None, "neither a 0 nor, worse, a 1"


def test_check_golds_lists_the_bad_ones_with_their_ids():
    prompts = [Prompt(f"p{i}", (1,), "q", {"answer": a}) for i, a in enumerate(["4", r"\frac{1}{", r"\sqrt{2}", ""])]
    for name in ("math_answer", "exact_match"):
        with RewardRunner([RewardSpec(function=name)]) as runner:
            bad = runner.check_golds(prompts)
            assert [b.prompt_id for b in bad] == (["p1", "p3"] if name == "math_answer" else ["p3"])
            assert {b.function for b in bad} == {name}
            assert "empty" in bad[-1].reason


def test_a_reference_that_hangs_is_listed_too():
    prompts = [
        Prompt(f"p{i}", (1,), "q", {"answer": a})
        for i, a in enumerate(["4", r"\int \gcd(9^{x}, \sum_{i=1}^{9^9} i^i) dx"])
    ]
    with RewardRunner([RewardSpec(function="math_answer", timeout=0.5)]) as runner:
        assert [(b.prompt_id, b.reason) for b in runner.check_golds(prompts)] == [
            ("p1", "timeout: no answer after 0.5 s of work")
        ]


def test_equal_texts_need_no_mathematics():
    """A reference beyond the guard's bounds is still met by its own text."""
    assert math_answer.score(r"\boxed{10^{10^{10}}}", answer="10^{10^{10}}") == 1.0


def test_guard():
    from sympy import Integer, Pow, Symbol, factorial

    for text in ("9^{9^{9^9}}", "(9^{9^9}, 1)", "2**3**4**5", "123456!", "10^{100000}"):
        assert too_large_text(text), text
    for text in ("2^{1000}", "x^{2^{10}}", "(2^3)^5", "10^{-3}", "5!", "2^{2^{3}}", "1.5^{2}", "0^{0}"):
        assert not too_large_text(text), text
    nine = Integer(9)
    tower = Pow(nine, Pow(nine, nine, evaluate=False), evaluate=False)
    assert too_large_expression(tower)
    assert too_large_expression(1 / Symbol("x") + tower)
    assert too_large_expression(Pow(Symbol("x"), 10**6))
    assert too_large_expression(factorial(factorial(Integer(10), evaluate=False), evaluate=False))
    assert not too_large_expression(Pow(Integer(2), Integer(1000), evaluate=False))
    assert too_large_expression(factorial(Integer(2001), evaluate=False))
    assert not too_large_expression(factorial(Integer(2000), evaluate=False) + Symbol("x") ** 7)


def test_last_boxed():
    assert last_boxed(r"\boxed{a{b}c} \boxed{d \} e}") == r"d \} e"
    assert last_boxed(r"\boxed{a} \boxed{cut off") == "a"
    assert last_boxed(r"\fbox{a}") == "a"
    assert last_boxed(r"\boxed 7.") == "7."
    assert last_boxed(r"\boxedness{a}") is None


def test_number_of():
    assert [number_of(t) for t in ("1,000", "073", "27.0", "-$5", "−5", "+1", ".5")] == [1000, 73, 27, -5, -5, 1, 0.5]
    assert [number_of(t) for t in ("", ".", "1,00", "1e999999", "x", "1/2", "٤", "9" * 500)] == [None] * 8


@pytest.mark.parametrize(
    ("name", "rate"), [("train_gsm8k.jsonl", 1.0), ("eval_math500.jsonl", 1.0), ("eval_aime24.jsonl", 1.0)]
)
def test_every_reference_of_real_data_parses_and_equals_itself(name, rate):
    rows = [json.loads(line) for line in shared_data(name).open()]
    math_answer.warm_up()
    good = [
        check_gold(answer=r["answer"]) is None
        and math_answer.score(rf"\boxed{{{r['answer']}}}", answer=r["answer"]) == 1.0
        for r in rows
    ]
    assert sum(good) / len(good) >= rate


def test_worked_solutions_of_real_data_score():
    rows = [json.loads(line) for line in shared_data("eval_math500.jsonl").open()]
    scores = [math_answer.score(r["solution"], answer=r["answer"]) for r in rows]
    assert sum(scores) == len(rows)


def test_through_the_runner():
    with RewardRunner([RewardSpec(function="math_answer"), RewardSpec(function="exact_match", weight=0.5)]) as runner:
        scored = runner.score([*rollouts(r"\boxed{\frac{1}{2}}", "1/3", answer="0.5"), rollout("x", 2)])
    assert [s.reward for s in scored] == [1.0, 0.0, None]
    assert [s.outcomes["math_answer"] for s in scored] == ["score", "score", "not-applicable"]
