"""Reward functions of every kind through the runner: what they get, what they may answer, what becomes of a failure."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.errors import ConfigError, RewardError
from llmrl.rewards import Noted, RewardRunner, row_verifier
from llmrl.rewards.tally import Tally
from tests.rewards.conftest import rollout, rollouts


def parts(scored, name):
    return [s.parts[name] for s in scored]


def kinds(scored, name):
    return [s.outcomes[name] for s in scored]


def run(spec, rows, state=None, **options):
    options.setdefault("on_error", "skip")
    with RewardRunner([RewardSpec(**spec)], workers=1, **options) as runner:
        tally = Tally()
        return runner.score(rows, state, tally), tally.metrics()


def test_weighted_sum_over_the_parts_that_apply():
    def always(completions, **kwargs):
        return [1.0] * len(completions)

    def sometimes(completions, **kwargs):
        return [None if c == "no" else 0.5 for c in completions]

    with RewardRunner([], reward_funcs=[(always, 2.0), sometimes]) as runner:
        scored = runner.score(rollouts("yes", "no"))
        assert runner.names == ["always", "sometimes"]
        assert runner.weights == [2.0, 1.0]
    assert [s.reward for s in scored] == [2.5, 2.0]
    assert kinds(scored, "sometimes") == ["score", "not-applicable"]


def test_reward_is_none_when_no_part_applies():
    with RewardRunner([], reward_funcs=lambda completions, **kw: [None, 0.0]) as runner:
        assert [s.reward for s in runner.score(rollouts("a", "b"))] == [None, 0.0]


def test_callables_get_what_trl_passes():
    seen = {}

    def full(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, level, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, level=level, rest=kwargs)
        seen["step"] = trainer_state.global_step
        log_extra("note", ["x", "y"])
        log_metric("mine", 2.0)
        return [0.0, 1.0]

    rows = [rollout("a", 0, ids=(5, 6), level=1, answer="4"), rollout("b", 1, ids=(7,), level=2, prompt="other")]
    with RewardRunner([], reward_funcs=[full]) as runner:
        scored = runner.score(rows, {"global_step": 7}, tally := Tally())
    metrics = tally.metrics()
    assert seen == {
        "prompts": ["q?", "other"],
        "completions": ["a", "b"],
        "ids": [[5, 6], [7]],
        "level": [1, 2],
        "rest": {"answer": ["4", None]},
        "step": 7,
    }
    assert [s.extra for s in scored] == [{"note": "x"}, {"note": "y"}]
    assert metrics["mine"] == 2.0
    assert metrics["reward_outcomes/full/score"] == 2


def test_only_accepted_arguments_are_passed():
    def narrow(completions):
        return [float(len(c)) for c in completions]

    with RewardRunner([], reward_funcs=narrow) as runner:
        assert [s.reward for s in runner.score(rollouts("ab", answer="1"))] == [2.0]


def test_conversational_rows_get_messages():
    seen = []

    def look(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return [1.0]

    messages = [{"role": "user", "content": "hi"}]
    with RewardRunner([], reward_funcs=look) as runner:
        runner.score([rollout("hello", prompt=messages)])
    assert seen == [([messages], [[{"role": "assistant", "content": "hello"}]])]


def test_async_functions_run_together():
    barrier = {"waiting": 0}

    def waiter(name):
        async def fn(completions, **kwargs):
            barrier["waiting"] += 1
            while barrier["waiting"] < 3:
                await asyncio.sleep(0.001)
            return [1.0] * len(completions)

        fn.__name__ = name
        return fn

    with RewardRunner([], reward_funcs=[waiter("a"), waiter("b"), waiter("c")]) as runner:
        assert runner.score(rollouts("x"))[0].reward == 3.0


def test_a_callable_that_is_late_is_a_timeout_and_the_next_call_works(monkeypatch):
    monkeypatch.setattr("llmrl.rewards.runner.CALLABLE_SECONDS", 0.2)
    release = threading.Event()

    def slow(completions, **kwargs):
        if completions[0] == "slow":
            release.wait(20)
        return [1.0] * len(completions)

    async def slow_async(completions, **kwargs):
        if completions[0] == "slow":
            await asyncio.sleep(20)
        return [1.0] * len(completions)

    with RewardRunner([], reward_funcs=[slow, slow_async], on_error="skip") as runner:
        begun = time.monotonic()
        first = runner.score(rollouts("slow"))[0]
        assert time.monotonic() - begun < 5
        second = runner.score(rollouts("fast"))[0]
    release.set()
    assert dict(first.outcomes) == {"slow": "timeout", "slow_async": "timeout"}
    assert first.reward is None
    assert second.reward == 2.0


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *[(1, "score"), (True, "score"), (None, "not-applicable"), (math.nan, "malformed"), (math.inf, "malformed")],
        *[("1.0", "malformed"), ([1.0], "malformed"), (10**400, "malformed"), (1j, "malformed")],
    ],
)
def test_values(value, kind):
    with RewardRunner([], reward_funcs=lambda completions: [value], on_error="skip") as runner:
        assert kinds(runner.score(rollouts("x")), "<lambda>") == [kind]


def test_numpy_values_score():
    import numpy as np

    with RewardRunner([], reward_funcs=lambda completions: np.array([0.5, 1.5], np.float32)) as runner:
        assert [s.reward for s in runner.score(rollouts("x", "y"))] == [0.5, 1.5]


@pytest.mark.parametrize("returned", [[1.0], [1.0] * 3, 1.0, None, "ab", {"a": 1, "b": 2}])
def test_wrong_shape_is_malformed_for_every_row(returned):
    with RewardRunner([], reward_funcs=lambda completions: returned, on_error="skip") as runner:
        assert kinds(runner.score(rollouts("x", "y")), "<lambda>") == ["malformed"] * 2


def test_stop_names_function_row_and_outcome(caplog):
    def grumpy(completions, **kwargs):
        raise ValueError("no good")

    with RewardRunner([], reward_funcs=grumpy, on_error="stop") as runner:
        with pytest.raises(RewardError, match=r"'grumpy': error on row 'p0', sample 0: ValueError: no good") as error:
            runner.score(rollouts("the completion"), tally=(tally := Tally()))
        assert tally.metrics()["reward_outcomes/grumpy/error"] == 1
    assert "the completion" in str(error.value)
    assert "test_runner.py" in str(error.value), "the traceback's tail says where"


def test_skip_gives_none_counts_and_logs(caplog):
    def picky(completions, **kwargs):
        return [1.0 if c else math.nan for c in completions]

    with (
        caplog.at_level(logging.WARNING, "llmrl.rewards"),
        RewardRunner([], reward_funcs=picky, on_error="skip") as runner,
    ):
        scored = runner.score(rollouts("x", "", "", "", "", ""), tally=(tally := Tally()))
        assert tally.metrics()["reward_outcomes/picky/malformed"] == 5
        runner.score(rollouts("x", ""), tally=tally)
        assert tally.metrics()["reward_outcomes/picky/malformed"] == 6, "a tally goes on counting"
    assert [s.reward for s in scored] == [1.0] + [None] * 5
    assert "malformed on row 'p1'" in caplog.text
    assert "2 more rows failed" in caplog.text


def test_a_named_function_by_path_with_arguments(user_file):
    spec = {"function": f"{user_file}:scaled", "args": {"factor": 3.0}}
    scored, _ = run(spec, rollouts("is 4", "is 5", answer="4"))
    assert parts(scored, "scaled") == [3.0, 0.0]


def test_a_named_function_by_module(user_file, monkeypatch):
    monkeypatch.syspath_prepend(user_file.parent)
    for target in ("my_rewards:by_length", "my_rewards.by_length"):
        scored, _ = run({"function": target}, rollouts("four"))
        assert parts(scored, "by_length") == [4.0]


@pytest.mark.parametrize("target", ["make_constant", "Constant"])
def test_factories_and_classes_take_the_arguments(user_file, target):
    scored, _ = run({"function": f"{user_file}:{target}", "args": {"value": 0.75}}, rollouts("x"))
    assert parts(scored, target) == [0.75]


def test_state_of_a_named_function_lives_from_call_to_call(user_file):
    with RewardRunner([RewardSpec(function=f"{user_file}:counts_calls")]) as runner:
        assert [runner.score(rollouts("x"))[0].reward for _ in range(3)] == [1.0, 2.0, 3.0]


def test_output_of_user_code_does_not_touch_the_protocol(user_file):
    scored, _ = run({"function": f"{user_file}:prints"}, rollouts("x", "y"))
    assert parts(scored, "prints") == [1.0, 1.0]


def test_an_async_function_in_a_worker(user_file):
    scored, _ = run({"function": f"{user_file}:async_reward"}, rollouts("x", "y"))
    assert parts(scored, "async_reward") == [0.25, 0.25]


def test_log_calls_are_replayed(user_file):
    scored, metrics = run({"function": f"{user_file}:logs"}, rollouts("ab", "c"), {"global_step": 4})
    assert [s.extra["seen"] for s in scored] == ["AB", "C"]
    assert metrics["user/step"] == 5.0


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("raises", "error", "the user's own mistake"),
        ("exits", "error", "SystemExit: 3"),
        ("dies", "error", "exited with code 0"),
        ("too_short", "malformed", "1 values for 2 completions"),
        ("sleeps", "timeout", "after 0.5 s of work"),
    ],
)
def test_failures_of_a_batch_function(user_file, caplog, name, kind, says):
    spec = RewardSpec(function=f"{user_file}:{name}", timeout=0.5)
    good = RewardSpec(function=f"{user_file}:by_length")
    with RewardRunner([spec, good], on_error="skip") as runner:
        for _ in range(2):  # a replaced worker serves the next step
            scored = runner.score(rollouts("x", "yy"))
            assert kinds(scored, name) == [kind, kind]
            assert [s.reward for s in scored] == [1.0, 2.0], "the other function is unaffected"
    assert says in caplog.text


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ({"function": "math_anser"}, ConfigError, "Did you mean math_answer"),
        ({"function": "{file}:by_lenght"}, ConfigError, "by_length"),
        ({"function": "no/such/file.py:f"}, ConfigError, "there is no file"),
        ({"function": "no_such_module_xyz:f"}, ConfigError, "there is no module 'no_such_module_xyz'"),
        ({"function": "{file}:calls"}, ConfigError, "names a int"),
        ({"function": "{file}:scaled", "args": {"facto": 1}}, ConfigError, "did you mean 'factor'"),
        ({"function": "{file}:scaled", "args": {"completions": 1}}, ConfigError, "no argument 'completions'"),
        ({"function": "{file}:make_constant"}, ConfigError, "needs value"),
        ({"function": "{file}:obeys", "args": {"bonsu": 1}}, ConfigError, "did you mean 'bonus'"),
        ({"function": "soft_overlong"}, ConfigError, "needs max_completion_len, soft_punish_cache"),
        (
            {"function": "soft_overlong", "args": {"max_completion_len": 4, "soft_punish_cache": 9}},
            ConfigError,
            "from 0",
        ),
        ({"function": "math_answer", "args": {"colum": "gold"}}, ConfigError, "did you mean 'column'"),
    ],
)
def test_what_can_not_be_loaded_fails_at_once(user_file, spec, error, says):
    spec = {**spec, "function": spec["function"].format(file=user_file)}
    with pytest.raises(error, match=says):
        RewardRunner([RewardSpec(**spec)])


def test_a_file_that_can_not_be_imported(tmp_path):
    for source, says in [
        ("import os; os._exit(4)", "exited with code 4"),
        ("1/0", "ZeroDivisionError"),
        ("x = (", "SyntaxError"),
    ]:
        path = tmp_path / "broken.py"
        path.write_text(source)
        with pytest.raises(RewardError, match=says):
            RewardRunner([RewardSpec(function=f"{path}:f")])


def test_a_missing_column_is_named(user_file):
    spec = RewardSpec(function=f"{user_file}:scaled")
    with RewardRunner([spec]) as runner:
        with pytest.raises(ConfigError, match=r"needs the column 'answer', which no row has; the rows have solution"):
            runner.check_golds([rollout("x", solution="4").prompt])
        with pytest.raises(ConfigError, match="needs the column 'answer'"):
            runner.score(rollouts("x", solution="4"))


def test_columns_that_can_not_travel(user_file):
    rows = rollouts("x", answer=object())
    with (
        RewardRunner([RewardSpec(function=f"{user_file}:scaled")]) as runner,
        pytest.raises(ConfigError, match="isolate: inline"),
    ):
        runner.score(rows)
    scored, _ = run({"function": f"{user_file}:by_length"}, rows)
    assert parts(scored, "by_length") == [1.0], "a column that only **kwargs would catch is left out"
    scored, _ = run({"function": f"{user_file}:by_length", "isolate": "inline"}, rows)
    assert parts(scored, "by_length") == [1.0]


def test_two_functions_of_one_name():
    spec = RewardSpec(function="think_format")
    with pytest.raises(ConfigError, match="two reward functions are called 'think_format'"):
        RewardRunner([spec, spec])
    with RewardRunner([spec, RewardSpec(function="think_format", name="again")]) as runner:
        assert runner.names == ["think_format", "again"]


def test_row_verifiers_handed_over_in_python():
    @row_verifier
    def has(completion, answer, *, points=1.0):
        return points if answer in completion else 0.0

    with RewardRunner([], reward_funcs=[has]) as runner:
        assert [s.reward for s in runner.score(rollouts("it is 4", "5", answer="4"))] == [1.0, 0.0]
    assert has(completions=["4", [{"role": "assistant", "content": "5"}]], answer=["4", "4"], points=2.0) == [2.0, 0.0]


def test_nothing_to_score_and_a_closed_runner():
    runner = RewardRunner([RewardSpec(function="think_format")])
    assert runner.score([]) == []
    runner.close()
    runner.close()
    with pytest.raises(RewardError, match="closed"):
        runner.score(rollouts("x"))


def test_every_part_has_its_time_and_what_it_says(user_file):
    """In workers and here, a row at a time and all at once; a failure says why, a score only where it is noted."""

    @row_verifier(safe=True)
    def half(completion):
        return Noted(0.5, "half\nof it")

    async def late(completions, **_):
        await asyncio.sleep(0.02)
        return [1.0] * len(completions)

    functions = [RewardSpec(function=f"{user_file}:obeys", timeout=1.0), f"{user_file}:by_length", half, late]
    with RewardRunner([], reward_funcs=functions, workers=1, on_error="skip") as runner:
        slow, stuck, wrong = runner.score(rollouts("sleep 0.2", "hang", "raise"))
    assert slow.seconds.keys() == stuck.seconds.keys() == set(runner.names)
    assert slow.seconds["obeys"] >= 0.2 and stuck.seconds["obeys"] == 1.0
    assert 3 * slow.seconds["late"] >= 0.02 and slow.seconds["late"] == wrong.seconds["late"], (
        "an equal share of the call"
    )
    assert slow.notes == {"half": "half"} and slow.parts["half"] == 0.5 and slow.seconds["half"] > 0
    assert stuck.notes["obeys"] == "no answer after 1 s of work"
    assert wrong.notes["obeys"] == "ValueError: row function raised"
