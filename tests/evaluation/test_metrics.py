"""Intervals that cover, pass@k that is unbiased."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llmrl.evaluation.metrics import accuracy_interval, mean_interval, mean_pass_at_k, pass_at_k, sample_sizes, student


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("m", [1, 2, 30, 1000])
def test_the_interval_has_a_width_at_none_and_all_right(m, n):
    for count in (0, n):
        p, low, high = accuracy_interval([count] * m, n)
        assert p == count / n
        assert 0 <= low <= p <= high <= 1
        assert high - low > 1 / (m + 4)


def test_one_answer_a_problem_is_wilsons_interval():
    # 81 of 263: the example of Newcombe 1998 (Statistics in Medicine 17, table I), 0.2553 to 0.3662 with the normal's quantile
    p, low, high = accuracy_interval([1] * 81 + [0] * 182, 1)
    assert p == pytest.approx(81 / 263)
    assert (low, high) == (pytest.approx(0.2553, abs=1e-3), pytest.approx(0.3662, abs=1e-3))
    for end in (
        low,
        high,
    ):  # the ends are those p from which 81 / 263 lies t standard errors off; t(0.975; 262) = 1.96906
        assert abs(end - 81 / 263) == pytest.approx(1.96906 * math.sqrt(end * (1 - end) / 263), rel=1e-5)


def test_students_quantile_is_the_tables():
    for freedom, value in ((10, 2.228139), (29, 2.045230), (99, 1.984217), (499, 1.964729)):
        assert student(freedom) == pytest.approx(value, rel=2e-3)


def test_repeated_answers_to_the_same_problems_add_nothing_when_problems_are_all_or_nothing():
    _, low1, high1 = accuracy_interval([1, 0] * 50, 1)
    assert accuracy_interval([8, 0] * 50, 8)[1:] == pytest.approx((low1, high1))
    _, low, high = accuracy_interval([4] * 100, 8)
    assert high - low < 0.5 * (high1 - low1)


def test_problems_with_different_numbers_of_samples_weigh_the_same():
    p, low, high = accuracy_interval([1, 0, 3, 2], [1, 2, 4, 8])
    assert p == pytest.approx((1 + 0 + 0.75 + 0.25) / 4)
    # by hand: shares 1, 0, .75, .25 vary by 5 / 24 around 1 / 2, and 0.1 / 4 is added: with a spread of 1 / 4 an effective 4 / 0.9333
    size, t = 4 / ((5 / 24 + 0.025) / 0.25), student(3)
    assert high - low == pytest.approx(2 * t / (1 + t * t / size) * math.sqrt(0.25 / size + t * t / (4 * size * size)))
    assert accuracy_interval([2, 4, 1], [4, 8, 2]) == pytest.approx(accuracy_interval([2, 2, 2], [4, 4, 4]), abs=0.05)
    assert accuracy_interval([3, 1], [4, 4]) == accuracy_interval([3, 1], 4)


def _covers(interval, p):
    return interval[1] <= p <= interval[2]


@pytest.mark.parametrize("m", [30, 100, 500])
def test_coverage_with_one_sample_a_problem_or_problems_solved_always_or_never(m):
    intervals = np.array([accuracy_interval([1] * x + [0] * (m - x), 1) for x in range(m + 1)])
    x = np.arange(m + 1)
    choose = np.array([math.lgamma(m + 1) - math.lgamma(i + 1) - math.lgamma(m - i + 1) for i in x])
    for p in np.linspace(0.05, 0.95, 361):
        weights = np.exp(choose + x * math.log(p) + (m - x) * math.log1p(-p))
        assert weights @ ((intervals[:, 1] <= p) & (p <= intervals[:, 2])) >= 0.93
    for solved in (0, 1, m // 3, m):  # the same interval, so the same coverage, with 16 samples
        assert accuracy_interval([16] * solved + [0] * (m - solved), 16) == pytest.approx(intervals[solved])


DRAWS = {
    "the same p": lambda rng, p, m: np.full(m, p),
    "Beta, total 0.3": lambda rng, p, m: rng.beta(0.3 * p, 0.3 * (1 - p), m),
    "Beta, total 1": lambda rng, p, m: rng.beta(p, 1 - p, m),
    "Beta, total 4": lambda rng, p, m: rng.beta(4 * p, 4 * (1 - p), m),
    "never, or 1 in 2": lambda rng, p, m: 0.5 * (rng.random(m) < 2 * p),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("m, rounds", [(30, 1500), (100, 400), (500, 250)])
def test_coverage_over_new_problems_with_sixteen_samples(m, rounds, draw):
    rng = np.random.default_rng(4)
    for p in (0.05, 0.4):
        hits = [_covers(accuracy_interval(rng.binomial(16, draw(rng, p, m)), 16), p) for _ in range(rounds)]
        # Larger sets are easier; their fewer rounds have two standard errors of room. benchmarks/intervals.py has the long table.
        assert np.mean(hits) >= 0.93 - (2 * math.sqrt(0.93 * 0.07 / rounds) if m > 30 else 0)


def test_coverage_with_ragged_samples():
    rng, hits = np.random.default_rng(5), 0
    for _ in range(1500):
        samples = rng.integers(1, 9, 40)
        hits += _covers(accuracy_interval(rng.binomial(samples, rng.beta(0.2, 0.8, 40)), samples), 0.2)
    assert hits / 1500 >= 0.93


def test_mean_interval_of_equal_counts_is_students_over_the_problems_means():
    # means 1 to 11: 6 +- t(0.975; 10) x sqrt(11) / sqrt(11) = 6 +- 2.2281; the quantile's expansion is 2% short of that
    mean, low, high = mean_interval([[k - 0.5, k + 0.5] for k in range(1, 12)])
    assert mean == 6 and high - 6 == pytest.approx(6 - low)
    assert high - 6 == pytest.approx(2.2281, rel=0.025)
    many = np.random.default_rng(0).normal(2, 3, 900)
    mean, low, high = mean_interval(many[:, None].tolist())
    assert (high - low) / 2 == pytest.approx(1.9626 * many.std(ddof=1) / 30, rel=1e-4)  # t(0.975; 899)


def test_mean_interval_where_rewards_are_missing_or_tell_nothing():
    assert mean_interval([[None], [None, None]]) is None
    assert mean_interval([[0.5, 1.5], [None]]) == (1.0, -math.inf, math.inf)
    assert mean_interval([[1.0], [1.0], [1.0]]) == (1.0, -math.inf, math.inf)
    assert mean_interval([[0.0, 2.0], [3.0, None]])[0] == pytest.approx(5 / 3)


def test_mean_interval_covers_with_few_completions_of_unlike_problems():
    rng, hits, rounds = np.random.default_rng(2), 0, 1500
    for _ in range(rounds):
        problems = rng.normal(0.7, 1, 40)
        rewards = [rng.normal(p, 2, rng.integers(1, 5)).tolist() for p in problems]
        _, low, high = mean_interval(rewards)
        hits += low <= 0.7 <= high
    assert 0.925 <= hits / rounds <= 0.975


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    assert pass_at_k(8, 2, 4) == pytest.approx(0.785714, abs=1e-6)
    for n, c, k in [(5, 0, 3), (5, 5, 1), (6, 1, 2), (6, 3, 4), (4, 2, 4)]:
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_mean_pass_at_k_starts_at_the_accuracy():
    correct = [0, 1, 3, 6]
    values = mean_pass_at_k(correct, 6)
    assert list(values) == [1, 2, 4, 6]
    assert values[1] == pytest.approx(accuracy_interval(correct, 6)[0])
    assert values[6] == pytest.approx(0.75)


def test_pass_at_k_is_unbiased_with_few_and_with_ragged_samples():
    rng, values = np.random.default_rng(6), []
    p = np.array([0.05, 0.3, 0.3, 0.9])
    n = np.array([4, 4, 7, 16])
    for _ in range(4000):
        values.append(mean_pass_at_k(rng.binomial(n, p), n))
    for k in (1, 2, 4, 8, 16):
        wanted = np.mean([1 - (1 - q) ** k for q, size in zip(p, n, strict=True) if size >= k])
        found = np.array([v[k] for v in values])
        assert found.mean() == pytest.approx(wanted, abs=4 * found.std() / math.sqrt(len(found)) + 1e-12)


def test_pass_at_k_is_listed_up_to_the_largest_number_of_samples():
    assert sample_sizes([3, 6]) == [1, 2, 4, 6] and sample_sizes([8]) == [1, 2, 4, 8] and sample_sizes([]) == []
    values = mean_pass_at_k([1, 3], [2, 6])
    assert values[1] == pytest.approx(accuracy_interval([1, 3], [2, 6])[0]) and values[6] == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: accuracy_interval([], 1),
        lambda: accuracy_interval([3], 2),
        lambda: accuracy_interval([1, 3], [2, 2]),
        lambda: accuracy_interval([1, 1], [2]),
        lambda: accuracy_interval([0, 0], [1, 0]),
        lambda: mean_pass_at_k([3], 2),
        lambda: pass_at_k(4, 2, 5),
        lambda: pass_at_k(4, 5, 1),
    ],
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(ValueError):
        call()
