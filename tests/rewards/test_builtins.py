"""The built-ins on format, length and repetition, beside TRL's own, and TRL's through the runner."""

from __future__ import annotations

import doctest
import importlib.util
from pathlib import Path

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.rewards import RewardRunner
from llmrl.rewards.combine import weighted_sum
from llmrl.rewards.format import tag_count, think_answer_format, think_format
from llmrl.rewards.length import length, repetition_penalty, soft_overlong
from llmrl.rewards.load import ALIASES, BUILTINS, import_target
from tests.rewards.conftest import rollout, rollouts

REWARD_FUNCTIONS = sorted((Path(__file__).parents[2] / "reward_functions").glob("*.py"))
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")

TEXTS = [
    "<think>a</think>b",
    "<think>\na\n</think>\nb",
    "<think>a",
    "a</think>",
    "",
    " <think>a</think>",
    "<think>a<think>b</think>",
    "<think>a</think><think>",
    "<think></think>",
    "<think>a</think>b</think>",
]


@pytest.mark.parametrize("path", REWARD_FUNCTIONS, ids=lambda p: p.stem)
def test_examples_of_reward_functions(path):
    """Each file's doctests cover a right, a wrong, an empty and a hostile answer."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = doctest.testmod(module)
    assert result.attempted >= 4 and result.failed == 0
    assert all(word in module.__doc__ for word in ("# right", "# wrong", "# empty", "# hostile"))


def test_reward_functions_by_path():
    root = REWARD_FUNCTIONS[0].parent
    specs = [
        RewardSpec(function=f"{root}/math_answer.py:math_answer"),
        RewardSpec(function=f"{root}/length.py:short", args={"limit": 4}),
        RewardSpec(function=f"{root}/repetition.py:repetition", args={"ngram_size": 1}),
    ]
    with RewardRunner(specs) as runner:
        row = runner.score([rollout(r"\boxed{4} \boxed{4}", ids=(1, 2, 3), answer="4")])[0]
    assert dict(row.parts) == {"math_answer": 1.0, "short": -0.5, "repetition": -0.5}


def test_every_name_resolves():
    for name in [*BUILTINS, *ALIASES]:
        assert import_target(name).__name__ == ALIASES.get(name, name)


def test_think_format():
    assert [think_format.score(t) for t in TEXTS] == [1, 1, 0, 0, 0, 0, 0, 0, 1, 1]


@needs_trl
def test_think_format_agrees_with_trl():
    from trl.rewards import think_format_reward

    assert think_format(completions=TEXTS) == think_format_reward([[{"content": t}] for t in TEXTS])


def test_think_answer_format():
    good = "<think>\nwhy\n</think>\n<answer>\n4\n</answer>"
    bad = [good + " ", good[1:], good.replace("\n</think>", "</think>"), "", "<think>\n</answer>"]
    assert [think_answer_format.score(t) for t in [good, *bad]] == [1, 0, 0, 0, 0, 0]


def test_tag_count():
    good = "<think>\nwhy\n</think>\n<answer>\n4\n</answer>"
    assert [tag_count.score(t) for t in (good, good + "\n</answer>", "<think>\n", "")] == [1.0, 0.75, 0.25, 0.0]


def test_soft_overlong():
    def score(n):
        return soft_overlong.score([0] * n, max_completion_len=20480, soft_punish_cache=4096)

    assert [score(n) for n in (0, 16384, 18432, 20480, 20481)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert soft_overlong.score([0] * 11, max_completion_len=10, soft_punish_cache=0) == -1.0


def test_length():
    assert [length.score([0] * n, target=10) for n in (0, 5, 10, 15, 40)] == [-1.0, -0.5, 0.0, -0.5, -1.0]
    assert [length.score([0] * n, target=10, kind="at_most") for n in (5, 15)] == [0.0, -0.5]
    assert [length.score([0] * n, target=10, kind="at_least") for n in (5, 15)] == [-0.5, 0.0]


def test_repetition_penalty():
    assert repetition_penalty.score([5] * 5, ngram_size=2) == -0.75
    assert repetition_penalty.score([1, 2, 3, 4], ngram_size=2) == 0.0
    assert repetition_penalty.score([1, 2], ngram_size=3) == 0.0


@needs_trl
def test_token_rewards_agree_with_trl():
    from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    ids = [[i % k for i in range(n)] for n in (0, 2, 9, 10, 15, 20, 21) for k in (1, 3, 50)]
    theirs = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=10)(ids)
    assert soft_overlong(completion_ids=ids, max_completion_len=20, soft_punish_cache=10) == theirs
    theirs = get_repetition_penalty_reward(ngram_size=3, max_penalty=-0.5)(ids)
    assert repetition_penalty(completion_ids=ids, ngram_size=3, max_penalty=-0.5) == pytest.approx(theirs)


@needs_trl
def test_trl_s_own_rewards_plug_in_unchanged():
    from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward

    messages = [{"role": "user", "content": "half?"}]
    text = r"<think>two quarters</think>\boxed{\frac{2}{4}}"
    rows = [rollout(text, 0, prompt=messages, solution=r"$\frac{1}{2}$", ids=[1] * 15)]
    rows.append(rollout(r"\boxed{3}", 1, prompt=messages, solution=r"$\frac{1}{2}$", ids=[1] * 4))
    callables = [accuracy_reward, think_format_reward, get_soft_overlong_punishment(20, 10)]
    with RewardRunner([], reward_funcs=callables) as runner:
        scored = runner.score(rows)
    assert [dict(s.parts) for s in scored] == [
        {"accuracy_reward": 1.0, "think_format_reward": 1.0, "soft_overlong_punishment_reward": -0.5},
        {"accuracy_reward": 0.0, "think_format_reward": 0.0, "soft_overlong_punishment_reward": 0.0},
    ]
    assert scored[0].extra["answer_parsed"] != scored[1].extra["answer_parsed"], "its log_extra columns arrive"


@needs_trl
def test_trl_s_rewards_by_name_with_arguments():
    args = {"max_completion_len": 20, "soft_punish_cache": 10}
    specs = [
        RewardSpec(function="trl.rewards:get_soft_overlong_punishment", name="overlong", args=args, timeout=60),
        RewardSpec(function="trl.rewards.accuracy_reward", timeout=60),
    ]
    row = rollout(r"\boxed{4}", prompt=[{"role": "user", "content": "?"}], solution="$4$", ids=[1] * 15)
    with RewardRunner(specs) as runner:
        assert dict(runner.score([row])[0].parts) == {"overlong": -0.5, "accuracy_reward": 1.0}


def test_cheap_built_ins_run_here_and_need_no_process(monkeypatch):
    monkeypatch.setattr("llmrl.rewards.runner.WorkerPool", None)
    specs = [RewardSpec(function=n) for n in ("think_format", "tag_count", "exact_match", "repetition_penalty")]
    with RewardRunner(specs) as runner:
        assert len(runner.score(rollouts("4", answer="4"))[0].parts) == 4


def test_weighted_sum():
    assert weighted_sum([1.0, None, 0.5], [1.0, 5.0, 2.0]) == 2.0
    assert weighted_sum([None, None], [1.0, 1.0]) is None
    assert weighted_sum([0.0, None], [1.0, 1.0]) == 0.0
