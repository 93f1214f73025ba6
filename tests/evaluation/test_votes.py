"""What votes are, which are the same, and how often the majority is right."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest

from llmrl.config.reward import RewardSpec
from llmrl.errors import ConfigError
from llmrl.evaluation import votes
from llmrl.evaluation.votes import Ballot, classes, extract, format_rate, maj_at_k, mean_maj_at_k, reads_answers
from llmrl.rewards.math import math_answer
from tests.conftest import ORACLES

MATH, CHOICE, EXACT = (RewardSpec(function=name) for name in ("math_answer", "multiple_choice", "exact_match"))
PAIRS = ORACLES.parent / "rewards" / "math_pairs.jsonl"


def partition(labels):
    """The classes as sets of places."""
    return {frozenset(i for i, label in enumerate(labels) if label == one) for one in labels if one is not None}


@pytest.mark.parametrize(
    "scorer, text, columns, answer",
    [
        (MATH, r"so \boxed{\frac{1}{2}}.", {"answer": "0.5"}, r"\frac{1}{2}"),
        (MATH, "we get 12 and then 7", {"answer": "5"}, "7"),
        (MATH, "I can't say", {"answer": "5"}, None),
        (MATH, r"cut off inside \boxed{4", {"answer": "42"}, None),
        (MATH, r"first \boxed{1}, the other is \boxed{2}", {"answer": "2, 1"}, "1, 2"),
        (MATH, r"first \boxed{1}, so all in all \boxed{1, 2}", {"answer": "2, 1"}, "1, 2"),
        (MATH, r"so \boxed{3}", {"answer": ""}, "3"),
        (RewardSpec(function="math_answer", args={"column": "gold"}), "it is 7", {"gold": 5}, "7"),
        (CHOICE, "The answer is (C).", {"answer": "A"}, "C"),
        (CHOICE, r"\boxed{\text{red}}", {"answer": "A", "choices": ["blue", "red"]}, None),
        (CHOICE, "Answer: red", {"answer": "A", "choices": ["blue", "red"]}, "B"),
        (CHOICE, "it depends", {"answer": "A"}, None),
        (EXACT, "12 + 7 = 19", {"answer": "19"}, "19"),
        (EXACT, "12 + 7 = 19", {"answer": "Paris"}, None),
    ],
)
def test_answers_are_what_the_verifier_reads(scorer, text, columns, answer):
    assert extract(scorer, text, columns) == answer


def test_a_right_completion_has_an_answer_that_is_right_by_itself():
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    right = [row for row in rows if math_answer.score(row["candidate"], answer=row["gold"]) == 1.0]
    assert len(right) > 300
    for row in right[::4]:
        answer = extract(MATH, row["candidate"], {"answer": row["gold"]})
        assert answer is not None, row
        rollout = votes._comparison(MATH, Ballot("x", [], []), row["gold"], answer)
        assert math_answer.score(rollout.completion.text, answer=row["gold"]) == 1.0, row


@pytest.mark.timeout(60)  # what is not linear takes hours, or for ever
@pytest.mark.parametrize("scorer", [MATH, CHOICE, EXACT], ids=lambda scorer: scorer.function)
def test_reading_an_answer_is_linear_in_the_text(scorer):
    for text in (
        "\n" * 100_000, " " * 100_000 + "x", "I hope it " * 800 + "x" * 100, "(" * 50_000, r"\boxed{" * 5_000, "$a" * 50_000,
        r"\boxed{" + "9^" * 900 + "9}", r"\boxed{10^{10^{10^{10}}}}", "Answer: " * 5_000, "1," * 50_000, "<|im_end|>" * 5_000,
    ):  # fmt: skip
        for gold in ("5", r"\frac{1}{2}", "Evelyn"):
            extract(scorer, text, {"answer": gold})


def test_code_instructions_judges_and_own_functions_have_no_answer_to_read():
    assert all(map(reads_answers, (MATH, CHOICE, EXACT)))
    for scorer in (
        RewardSpec(function="code_tests"), RewardSpec(function="ifeval"), RewardSpec(function="my_rewards.py:brevity"),
        RewardSpec(model=["some/model"]),
    ):  # fmt: skip
        assert not reads_answers(scorer)
    with pytest.raises(ConfigError, match="code_tests reads no answers"):
        extract(RewardSpec(function="code_tests"), "print(1)", {})


def test_format_rate_is_the_share_of_completions_with_an_answer():
    assert format_rate([["1", None], ["2", "3", None, None]]) == 0.5
    with pytest.raises(ValueError, match="no completions"):
        format_rate([[]])


def test_equal_answers_are_one_class_however_they_are_written():
    answers = ["1/2", "0.5", None, r"\frac12", "2", r"\frac{4}{2}", "2x+1", "1 + 2x", "1/2"]
    ballots = [Ballot("a", answers, [False] * 9, {"answer": "7"}), Ballot("b", ["8", "7", "7.0"], [False, True, True], {"answer": "7"})]  # fmt: skip
    first, second = classes(MATH, ballots)
    assert first[2] is None
    assert partition(first) == {frozenset({0, 1, 3, 8}), frozenset({4, 5}), frozenset({6, 7})}
    assert partition(second) == {frozenset({0}), frozenset({1, 2})}


def test_letters_and_texts_are_classed_by_their_own_verifier():
    (letters,) = classes(CHOICE, [Ballot("a", ["C", "C", "B"], [False] * 3, {"answer": "A"})])
    assert partition(letters) == {frozenset({0, 1}), frozenset({2})}
    (texts,) = classes(EXACT, [Ballot("a", ["1,000", "1000.0", "10"], [False] * 3, {"answer": "3"})])
    assert partition(texts) == {frozenset({0, 1}), frozenset({2})}


def test_in_a_mixture_each_row_is_classed_by_the_verifier_that_it_names():
    mixed = RewardSpec(function="verifier")
    math, choice = {"verifier": "math_answer", "answer": "3"}, {"verifier": "multiple_choice", "answer": "A"}
    assert extract(mixed, r"so \boxed{0.5}", math) == "0.5" and extract(mixed, "The answer is (C).", choice) == "C"
    assert extract(mixed, "print(1)", {"verifier": "code_tests", "answer": ""}) is None
    first, second = classes(mixed, [Ballot("a", ["1/2", "0.5"], [False] * 2, math), Ballot("b", ["B", "C"], [False] * 2, choice)])  # fmt: skip
    assert partition(first) == {frozenset({0, 1})} and partition(second) == {frozenset({0}), frozenset({1})}


def test_nothing_is_compared_where_nothing_is_open(monkeypatch):
    monkeypatch.setattr(votes, "RewardRunner", None)
    assert classes(MATH, [Ballot("a", ["1", "1.0", "2", "2", None], [True, True, False, False, False])]) == [
        [0, 0, 1, 1, None]
    ]


def test_comparisons_are_bounded():
    def asked(texts, verdict):
        sorter, number, sent = votes._sorter(texts), 0, None
        while True:
            try:
                pairs = sorter.send(sent)
            except StopIteration as done:
                return number, done.value
            number += len(pairs)
            sent = [verdict] * len(pairs)

    number, labels = asked(list(map(str, range(200))), False)
    assert votes.MOST_COMPARISONS - votes.AT_ONCE < number <= votes.MOST_COMPARISONS
    assert len(set(labels.values())) == 200
    number, labels = asked(list(map(str, range(200))), None)
    assert number == votes.AT_ONCE and len(set(labels.values())) == 200
    assert asked(["a", "b", "c"], True) == (2, {"a": 1, "b": 1, "c": 1})


def test_an_answer_that_never_ends_is_a_class_of_its_own(monkeypatch):
    monkeypatch.setattr(votes, "SECONDS", 0.5)
    hostile = r"\sum_{k=1}^{10^9} \sin(k^{k^k}) + \int_0^1 e^{e^{e^{x^x}}} dx"
    (labels,) = classes(MATH, [Ballot("a", ["1/2", hostile, "0.5", "}{"], [False] * 4, {"answer": "3"})])
    assert partition(labels) == {frozenset({0, 2}), frozenset({1}), frozenset({3})}


def by_enumeration(labels, correct, k):
    total = []
    for places in itertools.combinations(range(len(labels)), k):
        counts = Counter(labels[i] for i in places if labels[i] is not None)
        best = [label for label, count in counts.items() if count == max(counts.values())]
        shares = [np.mean([c for c, other in zip(correct, labels, strict=True) if other == label]) for label in best]
        total.append(np.mean(shares) if shares else 0.0)
    return np.mean(total)


@pytest.mark.parametrize("seed", range(40))
def test_maj_at_k_is_the_mean_over_all_subsets(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 11))
    labels = [None if x == 0 else int(x) for x in rng.integers(0, 5, n)]
    of_class = rng.random(5) < 0.4
    correct = [label is not None and bool(of_class[label]) for label in labels]
    if seed % 4 == 0:  # a class of which a part is right
        correct = [label is not None and bool(c) for label, c in zip(labels, rng.random(n) < 0.5, strict=True)]
    for k in range(1, n + 1):
        assert maj_at_k(labels, correct, k) == pytest.approx(by_enumeration(labels, correct, k), abs=1e-12)


def test_maj_at_k_of_many_samples_agrees_with_drawing_subsets():
    rng = np.random.default_rng(0)
    labels = [0] * 20 + [1] * 18 + [2] * 12 + [None] * 8 + list(range(3, 9))
    correct = [label == 0 for label in labels]
    sizes = np.array([20, 18, 12, *[1] * 6, 8])
    drawn = rng.multivariate_hypergeometric(sizes, 16, 200_000)[:, :-1]
    best = drawn.max(1, keepdims=True)
    share = np.where(drawn[:, 0] == best[:, 0], 1 / (drawn == best).sum(1), 0.0)
    assert maj_at_k(labels, correct, 16) == pytest.approx(share.mean(), abs=4 * share.std() / math.sqrt(len(share)))
    assert maj_at_k(labels, correct, 64) == pytest.approx(1.0)
    assert maj_at_k([0] * 700 + [1] * 1300, [True] * 700 + [False] * 1300, 1) == pytest.approx(0.35)


def test_mean_maj_at_k_leaves_out_problems_with_fewer_samples():
    labels, correct = [[0, 0, 1], [0], [None, 0]], [[True, True, False], [True], [False, True]]
    values = mean_maj_at_k(labels, correct)
    assert list(values) == [1, 2, 3]
    assert values[1] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert values[2] == pytest.approx((2 / 3 + 1) / 2)
    assert values[3] == pytest.approx(1)


def test_impossible_votes_are_refused():
    for labels, correct, k in (([0], [True], 2), ([0], [True], 0), ([0], [], 1)):
        with pytest.raises(ValueError, match="maj@k"):
            maj_at_k(labels, correct, k)
