"""Combiners and schedules of weights: closed forms, None, and no dependence on how a batch is cut or streamed."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from llmrl.config.load import dump_recipe, load_recipe
from llmrl.config.reward import RewardFields, RewardSpec, WeightSchedule
from llmrl.errors import ConfigError
from llmrl.rewards import RewardRunner, row_verifier
from llmrl.rewards.combine import combine_group, standardized
from tests.rewards.test_session import grouped, prompts_of

ROWS = [[1.0, 0.5], [0.0, 0.5], [1.0, None], [None, 0.25], [None, None]]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [3.0, 1.0, 2.0, 0.5, None]),
        ("product", [2.0, 0.0, 2.0, 0.5, None]),
        ("gated", [3.0, 0.0, 2.0, None, None]),
    ],
)
def test_closed_forms(how, expected):
    assert combine_group(ROWS, [2.0, 2.0], how) == expected


def test_the_gate():
    rows = [[0.7, 1.0], [0.69, 1.0], [-3.0, 1.0]]
    assert combine_group(rows, [1.0, 10.0], "gated", 0.7) == [10.7, 0.69, -3.0]
    assert combine_group([[0.7, 1.0]], [0.0, 10.0], "gated", 0.7) == [10.0]  # a gate that only gates


def test_standardized_is_trl_s_formula():
    a, b = 0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)
    assert standardized([1.0, None, 0.0]) == [a, None, b]
    assert standardized([0.1] * 3) == [0.0] * 3 and standardized([5.0, None]) == [0.0, None] and standardized([]) == []


def test_normalize_then_sum_lets_no_scale_drown_another():
    small = combine_group([[1.0, 30.0], [0.0, 10.0], [1.0, 20.0]], [1.0, 1.0], "normalize_then_sum")
    large = combine_group([[1e3, 30.0], [0.0, 10.0], [1e3, 20.0]], [1.0, 1.0], "normalize_then_sum")
    assert small == pytest.approx(large, abs=1e-3)
    std = math.sqrt(1 / 3) + 1e-4  # of 1, 0, 1
    assert small[0] == pytest.approx((1 / 3) / std + 10 / (10 + 1e-4))
    assert combine_group([[None, 1.0], [None, 0.0]], [1.0, 1.0], "normalize_then_sum")[0] == pytest.approx(
        0.70701, abs=1e-5
    )
    assert combine_group([], [1.0], "normalize_then_sum") == []


def test_normalize_then_sum_is_torch_s():
    torch = pytest.importorskip("torch")
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = ((values - values.mean(0)) / (values.std(0) + 1e-4)) @ torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    got = combine_group(values.tolist(), [1.0, 0.5, 2.0], "normalize_then_sum")
    assert got == pytest.approx(wanted.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", {-1: 1.0, 0: 1.0, 1: 0.75, 2: 0.5, 4: 0.0, 9: 0.0}),
        ("cosine", {0: 1.0, 1: (1 + math.cos(math.pi / 4)) / 2, 2: 0.5, 4: 0.0, 9: 0.0}),
        ("step", {0: 1.0, 3: 1.0, 4: 0.0, 9: 0.0}),
    ],
)
def test_schedules(kind, expected):
    schedule = WeightSchedule(start=1, end=0, steps=4, kind=kind)
    assert {step: schedule.at(step) for step in expected} == pytest.approx(expected)


@row_verifier(safe=True)
def size(completion):
    return None if completion == "none" else float(len(completion))


@row_verifier(safe=True)
def has_a(completion):
    return float("a" in completion)


GROUPS = [["a", "bb", "none"], ["aaa", "b", "cc"], ["dddd", "a", "none"]]


def score(groups, step=0, order=(), **options):
    weight = WeightSchedule(start=1.0, end=0.0, steps=4)
    with RewardRunner(
        [RewardSpec(function="think_format", weight=weight)], reward_funcs=[has_a, (size, 0.5)], **options
    ) as runner:
        runner._functions.reverse()  # the gate is `size`
        with runner.session(prompts_of(groups), {"global_step": step}) as session:
            for i in order:
                session.add(i, groups[i])
            return session.finish(groups)


@pytest.mark.parametrize("how", ["sum", "product", "gated", "normalize_then_sum"])
def test_cuts_and_streaming_change_nothing(how):
    groups = grouped(*GROUPS)
    whole = score(groups, 1, combine=how, gate_threshold=2.0)
    assert score(groups, 1, (2, 0), combine=how, gate_threshold=2.0) == whole
    assert [score([g], 1, combine=how, gate_threshold=2.0)[0] for g in groups] == whole
    assert [r.parts["size"] for r in whole[0]] == [1.0, 2.0, None]  # raw, whatever the rewards are


def test_weights_follow_the_step():
    rows = grouped(["<think>a</think>b"])
    assert [score(rows, step)[0][0].reward for step in (0, 2, 4, 9)] == [1 + 1 + 8.5, 0.5 + 1 + 8.5, 9.5, 9.5]
    with RewardRunner([RewardSpec(function="think_format", weight={"start": 1, "end": 0, "steps": 4})]) as runner:
        assert runner.weights == [1.0]


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"combine": "mean"}, "'sum', 'product', 'gated' or 'normalize_then_sum'"),
        ({"gate_threshold": 0.7}, "gate_threshold is of `combine: gated`; combine is sum"),
        ({"rewards": [{"function": "length", "weight": "heavy"}]}, "allowed: a number, or a schedule"),
        ({"rewards": [{"function": "length", "weight": True}]}, "allowed: a number, or a schedule"),
        ({"rewards": [{"function": "length", "weight": {"start": 1, "end": 0}}]}, "steps"),
        (
            {"rewards": [{"function": "length", "weight": {"start": 1, "end": 0, "steps": 0}}]},
            "greater than or equal to 1",
        ),
        (
            {"rewards": [{"function": "length", "weight": {"start": 1, "end": 0, "steps": 5, "kind": "cos"}}]},
            "'cosine'",
        ),
        ({"rewards": [{"function": "length", "weight": {"begin": 1, "end": 0, "steps": 5}}]}, "begin"),
    ],
)
def test_mistakes_are_told(recipe, says):
    with pytest.raises((ValidationError, ConfigError), match=says):
        RewardFields(**recipe)


def test_a_gate_alone():
    with pytest.raises(ConfigError, match="needs at least two rewards"):
        RewardRunner([], reward_funcs=[size], combine="gated")


def test_a_recipe_says_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model_name_or_path: m\ndataset: d\noutput_dir: runs/x\ncombine: gated\ngate_threshold: 1.0\nrewards:\n  - exact_match\n"
        "  - {function: think_format, weight: {start: 0.1, end: 1, steps: 100, kind: cosine}}\n"
    )
    config = load_recipe("grpo", path, ["rewards.0.weight=2", "rewards.1.weight.steps=50"])
    assert (config.combine, config.gate_threshold) == ("gated", 1.0)
    assert config.rewards[0].weight == 2.0 and config.rewards[1].weight.at(50) == 1.0
    path.write_text(dump_recipe(config))
    assert load_recipe("grpo", path) == config
