"""How many samples and problems a margin needs: against the intervals themselves, and by simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from llmrl.cli.main import main
from llmrl.errors import ConfigError
from llmrl.evaluation.howmany import Spread, how_many, problems_needed, spread_of
from llmrl.evaluation.metrics import accuracy_interval


def half(correct, n):
    _, low, high = accuracy_interval(correct, n)
    return (high - low) / 2


def test_one_sample_and_the_worst_case_are_the_interval_itself():
    correct = [1] * 12 + [0] * 18
    assert Spread(0.4, 0.3).half_width(30, 1) == pytest.approx(half(correct, 1))
    for k in (1, 16, math.inf):
        assert Spread(0.4, 1.0).half_width(30, k) == pytest.approx(half([16 * c for c in correct], 16))


@pytest.mark.parametrize("total, m, k", [(1, 30, 16), (3, 100, 4)])
def test_the_half_width_is_what_evaluations_come_to(total, m, k):
    rng = np.random.default_rng(0)
    found = [half(rng.binomial(k, rng.beta(0.4 * total, 0.6 * total, m)), k) for _ in range(400)]
    # Beta's variance is p (1 - p) / (1 + total)
    assert np.mean(found) == pytest.approx(Spread(0.4, 1 / (1 + total)).half_width(m, k), rel=0.03)


def test_the_same_problems_again_move_by_the_noise_of_samples_only():
    rng, spread = np.random.default_rng(1), Spread(0.4, 1 / 2)
    theta = rng.beta(0.4, 0.6, 2000)  # so many that their own p (1 - p) is as assumed
    runs = rng.binomial(8, theta, (1000, 2000)).mean(1) / 8
    assert spread.repeat_width(2000, 8) == pytest.approx(1.96 * runs.std(), rel=0.08)
    assert Spread(0.4, 1.0).repeat_width(30, 4) == 0


def test_the_spread_is_read_from_verdicts_without_bias():
    rng, found = np.random.default_rng(2), []
    for _ in range(300):
        theta = rng.beta(0.6, 1.4, 60)
        found.append(spread_of([rng.random(int(n)) < t for t, n in zip(theta, rng.integers(2, 7, 60), strict=True)]))
    assert np.mean([s.share for s in found]) == pytest.approx(1 / 3, abs=0.02)
    assert np.mean([s.accuracy for s in found]) == pytest.approx(0.3, abs=0.01)


def test_the_spread_of_extreme_results():
    assert spread_of([[True] * 4, [False] * 4, [False] * 4]) == Spread(1 / 3, 1.0)
    assert spread_of([[True, False]] * 5) == Spread(0.5, 0.0)
    for unknown in ([[True], [False]], [[True, True]] * 3, [[True, False], [True]]):
        assert spread_of(unknown) is None


def test_problems_needed_are_the_fewest():
    for spread in (Spread(0.4, 0.5), Spread(0.97, 0.2)):
        for k in (1, 8, math.inf):
            needed = problems_needed(spread, k, 0.02)
            assert spread.half_width(needed, k) <= 0.02 < spread.half_width(needed - 1, k)
    assert problems_needed(Spread(0.5, 0.5), 1, 1e-5) is None


def test_a_plan_says_what_is_enough():
    plan = how_many(0.033, 500, Spread(0.5, 0.5))
    widths = [row["half_width"] for row in plan["rows"]]
    assert widths == sorted(widths, reverse=True)
    assert plan["samples"] == 8 and plan["rows"][3]["half_width"] <= 0.033 < plan["rows"][2]["half_width"]
    plan = how_many(0.02, 30, Spread(0.4, 0.5))
    assert plan["samples"] is None and plan["limit"] > 0.1 and plan["problems_at_limit"] > 1000
    assert plan["same_problems_samples"] == 64


@pytest.mark.parametrize(
    "margin, problems, accuracy, said",
    [(0, 30, 0.4, "--how-many 0"), (0.5, 30, 0.4, "half width"), (0.02, 0, 0.4, "--problems 0"), (0.02, 30, 1.0, "--accuracy 1")],
)  # fmt: skip
def test_what_can_not_be_is_refused(margin, problems, accuracy, said):
    with pytest.raises(ConfigError, match=said):
        how_many(margin, problems, Spread(accuracy, 0.5))


def test_the_command_says_when_no_number_of_samples_is_enough(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["eval", "--how-many", "0.02", "--benchmark", "aime24,math500", "--accuracy", "0.4"]) == 0
    out = capsys.readouterr().out
    assert "aime24: 30 problems" in out and "math500: 500 problems" in out
    assert "No number of samples is enough: 30 problems alone leave" in out and "nothing known of this model" in out
    assert main(["eval", "--how-many=0.1", "--problems", "500"]) == 0
    assert "1 sample a problem is enough" in capsys.readouterr().out


def test_the_command_takes_the_spread_of_a_result(tmp_path, capsys):
    rows = [{"id": str(i), "correct": [True] * (i % 5) + [False] * (4 - i % 5)} for i in range(40)]
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"format": "llmrl-result/1", "benchmark": "mine", "per_row": rows}))
    assert main(["eval", "--how-many", "0.05", "--result", str(file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["benchmark"] == "mine" and plan["problems"] == 40 and plan["accuracy"] == 0.5
    assert plan["between_share"] == pytest.approx(spread_of([r["correct"] for r in rows]).share)
    file.write_text(json.dumps({"format": "llmrl-result/1", "per_row": [{"id": "a", "correct": [True]}]}))
    assert main(["eval", "--how-many", "0.05", "--result", str(file)]) == 2
    assert "does not show how much problems differ" in capsys.readouterr().err
    assert main(["eval", "--how-many", "0.05"]) == 2
