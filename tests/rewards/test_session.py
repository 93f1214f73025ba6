"""Groups that are scored as they finish: the same results as all at once, from any thread, and nothing left behind."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.errors import ConfigError, RewardError
from llmrl.rewards import RewardRunner, row_verifier
from llmrl.rewards.tally import Tally
from llmrl.types import Completion, Prompt, Rollout
from tests.rewards.conftest import rollouts

STATE = {"global_step": 3}


def grouped(*groups, **columns):
    """A group of completions for each prompt; only prompts with an even number have the column `even`."""
    out = []
    for i, texts in enumerate(groups):
        prompt = Prompt(f"p{i}", (1,), "q?", {**columns, **({"even": i} if i % 2 == 0 else {})})
        out.append([Rollout(prompt, Completion((7,), (0.0,), "stop", text), n) for n, text in enumerate(texts)])
    return out


def prompts_of(groups):
    return [group[0].prompt for group in groups]


def one_of_each(user_file, seen):
    """Every kind of function, with one that notes what it was called with."""

    def batch(completions, log_extra, log_metric, even, **kwargs):
        seen.append((list(completions), list(even)))
        log_extra("place", list(range(len(completions))))
        log_metric("batch/rows", len(completions))
        return [None if c == "none" else float(len(c)) for c in completions]

    async def waits(completions, **kwargs):
        await asyncio.sleep(0.01)
        return [0.5] * len(completions)

    @row_verifier
    def here(completion, **columns):
        if completion == "raise":
            raise ValueError("not here")
        return 1.0

    named = [("obeys", 1.0), ("row_logs", None), ("by_length", None)]
    specs = [RewardSpec(function=f"{user_file}:{name}", timeout=seconds) for name, seconds in named]
    return [*specs, RewardSpec(function="think_format")], [batch, waits, here]


GROUPS = [
    *[("ok", "ok then", "none"), ("hang", "ok", "<think>a</think>b"), ("die", "ok", "ok")],
    *[("raise", "ok", "sleep 0.1"), ("ok", "x" * 50, "bigint")],
]


def stream(runner, groups, order, tally, seconds=0.0):
    with runner.session(prompts_of(groups), STATE, tally) as session:
        for i in order:
            time.sleep(seconds)
            session.add(i, groups[i])
        return session.finish(groups)


def timeless(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith("reward_seconds/")}


def told(caplog):
    """What was logged, without memory addresses and the like: its first lines."""
    found = [r.getMessage().splitlines()[0] for r in caplog.records if r.name == "llmrl.rewards"]
    caplog.clear()
    return found


@pytest.mark.parametrize(("order", "seconds"), [((3, 0, 4, 1, 2), 0.0), ((2, 4), 0.0), ((4, 3, 2, 1, 0), 0.3)])
def test_streaming_changes_nothing(user_file, caplog, order, seconds):
    caplog.set_level(logging.WARNING, "llmrl.rewards")
    groups, seen = grouped(*GROUPS), []
    specs, functions = one_of_each(user_file, seen)
    with RewardRunner(specs, reward_funcs=functions, on_error="skip") as runner:
        whole, parts = Tally(), Tally()
        expected = iter(runner.score([r for g in groups for r in g], STATE, whole))
        expected = [[next(expected) for _ in g] for g in groups]
        logged = told(caplog)
        scored = stream(runner, groups, order, parts, seconds)
    assert scored == expected
    assert timeless(parts.metrics()) == timeless(whole.metrics())
    assert told(caplog) == logged and len(logged) >= 4
    assert seen[0] == seen[1] and len(seen) == 2, "a batch function is called once, with everything in order"
    columns, step = scored[1][0].extra["seen_by_row"]
    assert columns["even"] is None and scored[2][0].extra["seen_by_row"][0]["even"] == 2 and step == 3
    counts = parts.metrics()
    assert [counts[f"reward_outcomes/obeys/{k}"] for k in ("timeout", "error", "not-applicable")] == [2, 2, 1]
    assert counts["row/length"] == pytest.approx(sum(len(t) for g in GROUPS for t in g) / 15)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([("die", "die", "ok"), ("die", "die", "ok")], "4 of 6 rows failed"),
        ([("ok", "ok", "die"), ("die", "die", "ok")], None),
        ([("ok", "ok", "ok"), ("ok", "raise", "ok")], "error on row 'p1', sample 1: ValueError: row function raised"),
    ],
)
def test_the_policy_counts_over_all_groups(user_file, texts, says):
    groups = grouped(*texts)
    with RewardRunner([RewardSpec(function=f"{user_file}:obeys", timeout=1.0)], on_error="stop") as runner:
        if says is None:
            assert stream(runner, groups, [0, 1], None)[1][2].reward == 1.0
            return
        with pytest.raises(RewardError) as alone:
            runner.score([r for g in groups for r in g])
        with pytest.raises(RewardError) as streamed:
            stream(runner, groups, [0, 1], None)
        assert says in str(streamed.value) and str(streamed.value) == str(alone.value)


def test_rows_are_scored_while_others_are_sampled(user_file):
    groups = grouped(*[["sleep 0.2"] * 2] * 3)
    with (
        RewardRunner([RewardSpec(function=f"{user_file}:obeys")], workers=2) as runner,
        runner.session(prompts_of(groups), tally=(tally := Tally())) as session,
    ):
        for i, group in enumerate(groups):
            session.add(i, group)
            time.sleep(0.5)
        begun = time.monotonic()
        session.finish(groups)
        assert time.monotonic() - begun < 0.3, "the rows had been scored"
    assert 0.5 < tally.metrics()["reward_seconds/obeys"] < 1.2, "time without rows to score does not count"


def test_a_function_that_raises_stops_the_engine(user_file):
    groups = grouped(["raise", "hang"], *[["hang", "ok"]] * 200)
    with RewardRunner([RewardSpec(function=f"{user_file}:obeys", timeout=60)], workers=2) as runner:
        begun = time.monotonic()
        with pytest.raises(RewardError, match="error on row 'p0', sample 0: ValueError: row function raised"):
            stream(runner, groups, range(len(groups)), None, seconds=0.05)
        assert time.monotonic() - begun < 5, "at the next group, and not when all were sampled"
        assert [s.reward for s in runner.score(rollouts("ok", "ok"))] == [1.0, 1.0]


def test_a_pool_that_can_not_start_workers_stops_the_engine(user_file, monkeypatch):
    groups = grouped(*[["die"]] * 40)
    with RewardRunner([RewardSpec(function=f"{user_file}:obeys")], workers=2, on_error="skip") as runner:
        runner._functions[0].pool._setup["target"] = f"{user_file}:gone"
        with pytest.raises(ConfigError, match="gone"):
            stream(runner, groups, range(len(groups)), None, seconds=0.2)


def test_what_fails_elsewhere_leaves_no_work_behind(user_file):
    groups = grouped(*[["hang", "bigint"]] * 4)
    with RewardRunner([RewardSpec(function=f"{user_file}:obeys", timeout=60)], workers=2) as runner:
        begun = time.monotonic()
        with pytest.raises(ZeroDivisionError), runner.session(prompts_of(groups)) as session:
            for i, group in enumerate(groups):
                session.add(i, group)
            time.sleep(0.2)
            raise ZeroDivisionError
        assert [s.reward for s in runner.score(rollouts("ok", "ok"))] == [1.0, 1.0]
        assert time.monotonic() - begun < 10
        with pytest.raises(RewardError, match="session is over"):
            session.add(0, groups[0])


def test_one_session_s_end_does_not_touch_another_s_rows(user_file):
    """Rows of both wait in one queue, and travel in the same chunks."""
    mine, other = grouped(*[["sleep 0.02"] * 4] * 8), grouped(*[["sleep 0.02", "ok"]] * 16)
    with (
        RewardRunner([RewardSpec(function=f"{user_file}:obeys")], workers=2) as runner,
        runner.session(prompts_of(mine), tally=(tally := Tally())) as session,
    ):
        with runner.session(prompts_of(other)) as abandoned:
            for i in range(8):
                abandoned.add(2 * i, other[2 * i])
                session.add(i, mine[i])
                abandoned.add(2 * i + 1, other[2 * i + 1])
        scored = session.finish(mine)
    assert [[s.reward for s in group] for group in scored] == [[1.0] * 4] * 8
    assert tally.metrics()["reward_outcomes/obeys/score"] == 32


def test_sessions_in_several_threads(user_file, monkeypatch):
    """Functions in this process run for one caller at a time, and waiting for the others is not on their clock."""
    monkeypatch.setattr("llmrl.rewards.runner.CALLABLE_SECONDS", 1.0)
    inside = []

    def alone(completions, log_metric, **kwargs):
        inside.append(completions[0])
        time.sleep(0.3)
        log_metric("others", sum(c != completions[0] for c in inside))
        inside.remove(completions[0])
        return [float(len(c)) for c in completions]

    async def alone_too(completions, log_metric, **kwargs):
        inside.append(completions[0])
        await asyncio.sleep(0.1)
        log_metric("others", sum(c != completions[0] for c in inside))
        inside.remove(completions[0])
        return [1.0] * len(completions)

    specs = [RewardSpec(function=f"{user_file}:{name}") for name in ("obeys", "by_length")]
    results, tallies = {}, [Tally() for _ in range(5)]
    with RewardRunner(specs, reward_funcs=[alone_too, alone]) as runner:

        def run(number):
            groups = grouped(*[["x" * (number + 1)] * 3] * (number + 1))
            results[number] = stream(runner, groups, range(number + 1), tallies[number])

        threads = [threading.Thread(target=run, args=(n,)) for n in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    for number, tally in enumerate(tallies):
        assert [[s.reward for s in g] for g in results[number]] == [[2.0 + 2 * (number + 1)] * 3] * (number + 1)
        counts = tally.metrics()
        assert all(counts[f"reward_outcomes/{name}/score"] == 3 * (number + 1) for name in runner.names)
        assert counts["others"] == 0


def test_closing_ends_a_session_elsewhere(user_file):
    runner = RewardRunner([RewardSpec(function=f"{user_file}:obeys", timeout=60)])
    found = []

    def score():
        try:
            runner.score(rollouts("hang"))
        except RewardError as error:
            found.append(str(error))

    thread = threading.Thread(target=score)
    thread.start()
    time.sleep(0.3)
    runner.close()
    thread.join(5)
    assert "closed while it was scoring" in found[0]


def test_what_an_engine_may_not_do(user_file):
    groups = grouped(["ok"], ["ok"])
    with RewardRunner([RewardSpec(function=f"{user_file}:obeys")]) as runner:
        with pytest.raises(RewardError, match="number 0 was added twice"):
            stream(runner, groups, [0, 0], None)
        with (
            pytest.raises(RewardError, match="another group for prompt 'p0'"),
            runner.session(prompts_of(groups)) as session,
        ):
            session.add(0, grouped(["other"])[0])
            session.finish(groups)
        with pytest.raises(RewardError, match="1 groups for 2 prompts"), runner.session(prompts_of(groups)) as session:
            session.finish(groups[:1])


def test_a_missing_column_is_named_before_anything_is_sampled(user_file):
    spec = RewardSpec(function=f"{user_file}:scaled")
    with RewardRunner([spec]) as runner, pytest.raises(ConfigError, match="needs the column 'answer'"):
        runner.session(prompts_of(grouped(["ok"])))
