"""The difference of two models: by hand, by enumeration, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llmrl.evaluation import paired
from llmrl.evaluation.metrics import student
from llmrl.evaluation.paired import difference_interval, differences, sign_flip_p_value


def ones(n):
    return [1] * n


def test_the_difference_is_of_problems_means():
    scaled, whole = differences([1, 0, 3], [2, 1, 4], [1, 1, 0], [1, 1, 6])
    assert [x / whole for x in scaled] == pytest.approx([0.5, 1, -0.75])
    mean, low, high = difference_interval([1, 0, 3], [2, 1, 4], [1, 1, 0], [1, 1, 6])
    assert mean == pytest.approx(0.25) and low < 0.25 < high


def test_one_sample_a_problem_is_bonett_and_prices_interval():
    # 100 pairs, of which B alone solves 20 and A alone 8: shares 21 / 102 and 9 / 102
    a, b = [0] * 20 + [1] * 80, [1] * 20 + [0] * 8 + [1] * 72
    mean, low, high = difference_interval(a, ones(100), b, ones(100))
    p, q = 21 / 102, 9 / 102
    half = student(99) * math.sqrt((p + q - (p - q) ** 2) / 102)
    assert mean == pytest.approx(0.12)
    assert (low, high) == (pytest.approx(p - q - half), pytest.approx(p - q + half))


def test_models_that_agree_everywhere_may_still_differ_a_little():
    for k in (1, 8):
        mean, low, high = difference_interval([k, 0] * 15, [k] * 30, [k, 0] * 15, [k] * 30)
        assert mean == 0 and low == -high and 0.05 < high < 0.15
    assert difference_interval([0], [1], [1], [1])[2] == 1.0


def by_enumeration(d):
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=len(d))]  # fmt: skip
    return np.mean([s >= abs(sum(d)) for s in sums])


@pytest.mark.parametrize("seed", range(12))
def test_the_p_value_is_the_share_of_all_sign_flips(seed):
    d = np.random.default_rng(seed).integers(-6, 7, 11)
    p, exact = sign_flip_p_value(d)
    assert exact and p == pytest.approx(by_enumeration(d))


def test_of_one_sample_a_problem_it_is_mcnemars_exact_test():
    for won, lost in ((5, 1), (10, 3), (4, 4), (0, 0), (9, 0), (300, 250)):
        tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1)) / 2 ** (won + lost)
        p, exact = sign_flip_p_value(np.array([1] * won + [-1] * lost + [0] * 7, dtype=object))
        assert exact and p == pytest.approx(min(1.0, 2 * tail))


def test_drawn_flips_agree_with_all_flips_and_are_the_same_each_time(monkeypatch):
    d = np.random.default_rng(1).integers(-16, 19, 60)
    p, exact = sign_flip_p_value(d)
    monkeypatch.setattr(paired, "_MOST_STEPS", 0)
    drawn, by_all = sign_flip_p_value(d)
    assert exact and not by_all and drawn == sign_flip_p_value(d)[0]
    assert drawn == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 100_000) + 1e-5)


def change(truth, function):
    function.truth = truth
    return function


@pytest.mark.parametrize("m, k", [(30, 1), (30, 16), (100, 4)])
@pytest.mark.parametrize(
    "mean, total, theta_b",
    [
        (0.3, 1, change(0.0, lambda rng, a: a)),
        (0.5, 0.3, change(0.0, lambda rng, a: rng.beta(0.15, 0.15, len(a)))),
        (0.2, 1, change(0.16, lambda rng, a: a + 0.2 * (1 - a))),
        (0.05, 0.3, change(0.095, lambda rng, a: a + 0.5 * (1 - a) * (rng.random(len(a)) < 0.2))),
    ],
    ids=["no change", "another model, as good", "a fifth less failures", "half of the failures of some problems"],
)
def test_coverage_and_errors_of_the_first_kind(m, k, mean, total, theta_b):
    rng, rounds, n = np.random.default_rng(8), 400, [k] * m
    covered = rejected = 0
    for _ in range(rounds):
        a = rng.beta(mean * total, (1 - mean) * total, m)
        x, y = rng.binomial(k, a).tolist(), rng.binomial(k, theta_b(rng, a)).tolist()
        _, low, high = difference_interval(x, n, y, n)
        covered += low <= theta_b.truth <= high
        rejected += sign_flip_p_value(differences(x, n, y, n)[0])[0] <= 0.05
    # two standard errors of room; benchmarks/intervals.py has the long table
    assert covered / rounds >= 0.93 - 2 * math.sqrt(0.93 * 0.07 / rounds)
    if theta_b.truth == 0:
        assert rejected / rounds <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / rounds)
    elif m == 100:
        assert rejected / rounds > 0.7  # and what is there is found


def test_impossible_counts_are_refused():
    for given in (([], [], [], []), ([1], [1], [1], []), ([2], [1], [0], [1]), ([0], [0], [0], [1])):
        with pytest.raises(ValueError):
            difference_interval(*given)
