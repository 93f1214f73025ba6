"""Numbers within a tolerance of the reference."""

from __future__ import annotations

import pytest

from llmrl.errors import ConfigError
from llmrl.rewards.load import resolve
from llmrl.rewards.math import check_gold, math_answer
from llmrl.rewards.math_near import near


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("4.5e33", r"4.5002 \times 10^{33}", True), ("4.5e33", r"4.502 \times 10^{33}", False), ("-2", "-2.0001", True),
        ("-2", "2", False), ("1.6", r"1.60001 \mathrm{~cm}", True), (r"\arcsin{10/13}", r"50.2849^\circ", True),
        (r"\frac{1}{3}", "0.33334", True), (r"\frac{1}{3}", "0.334", False), ("5", "x=5.0001", True), ("5", "x+y=5", False),
        ("0", "0.00001", False), ("2", "2i", False), ("x", "x", False), ("1,2", "1,2", False), ("(1,2)", "(1,2)", False),
        (r"45\text{ min}", r"0.75001 \text{ hours}", True), (r"45\text{ min}", r"45.001 \text{ cm}", False),
        ("50", r"50.001\%", True), (r"50\%", "50.001", True), ("words", "5", False), ("5", "words and more", False),
    ],
)  # fmt: skip
def test_near(gold, answer, expected):
    assert near(gold, answer, relative=1e-4) is expected


def test_an_absolute_tolerance():
    assert near("0", "-0.1", absolute=0.1) and not near("0", "-0.11", absolute=0.1)
    assert near("100", "101", relative=0.01, absolute=0.1) and not near(
        "100", "102", relative=0.01, absolute=0.1
    )  # the larger


def test_as_arguments_of_the_verifier():
    score = math_answer.score
    assert score(r"\boxed{4.5001}", answer="4.5", rel_tol=1e-4) == 1.0 and score(r"\boxed{4.5001}", answer="4.5") == 0.0
    assert score(r"\boxed{4.3}", answer="4.2", error=0.1, tolerance="error") == 1.0
    assert score(r"\boxed{4.3}", answer="4.2", error=None, tolerance="error") == 0.0  # a row without one
    assert check_gold(answer="4.2", error=0.1, tolerance="error") is check_gold(answer="4.2", tolerance="error") is None
    assert "must be a number from 0, given '1e-1'" in check_gold(answer="4.2", error="1e-1", tolerance="error")


@pytest.mark.parametrize("rel_tol", [-1, "1e-4"])
def test_arguments_that_can_not_be(rel_tol):
    with pytest.raises(ConfigError, match="rel_tol must be a number from 0"):
        resolve("math_answer", {"rel_tol": rel_tol})
