"""What users' functions may do to their runner: raise anything, change their arguments, fork, stand still. It names them and goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.rewards.runner import RewardRunner
from llmrl.train.records import Records

from .conftest import alive, children, rollout, rollouts, wait_until

FUNCTIONS = """
import os
from llmrl.rewards import row_verifier


def forks(completions, **kwargs):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return [1.0 if child else 9.0] * len(completions)


@row_verifier
def row_forks(completion):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return float(completion) if child else 9.0


def aborts(completions, **kwargs):
    raise GeneratorExit("of no use here")


@row_verifier
def pid(completion):
    return float(os.getpid())
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("conduct") / "conduct.py"
    path.write_text(FUNCTIONS)
    return path


class Unspeakable(BaseException):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize("error", [GeneratorExit, SystemExit, Unspeakable, asyncio.CancelledError])
def test_whatever_is_raised_here_is_an_error_of_that_function(error):
    def raises(completions, **kwargs):
        raise error

    async def raises_async(completions, **kwargs):
        raise error

    with RewardRunner([], reward_funcs=[raises, raises_async], on_error="skip") as runner:
        (row,) = runner.score(rollouts("a"))
        assert dict(row.outcomes) == {"raises": "error", "raises_async": "error"}
        assert all(error.__name__ in note for note in row.notes.values())


def test_an_async_function_s_interrupt_leaves_the_loop_alive():
    async def interrupts(completions, **kwargs):
        raise KeyboardInterrupt

    async def fine(completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0]

    with RewardRunner([], reward_funcs=[interrupts, fine], on_error="skip") as runner:
        for _ in range(2):
            assert dict(runner.score(rollouts("a"))[0].outcomes) == {"interrupts": "error", "fine": "score"}


def test_in_a_worker_the_error_is_named(file):
    with RewardRunner([RewardSpec(function=f"{file}:aborts")], on_error="skip", workers=1) as runner:
        (row,) = runner.score(rollouts("a"))
    assert row.notes["aborts"] == "GeneratorExit: of no use here"


def test_changed_arguments_change_nothing_for_others():
    def spoils(prompts, completions, completion_ids, answer, meta, **kwargs):
        prompts[0].append({"role": "user", "content": "x"})
        prompts[0][0]["content"] = meta[0]["deep"][0] = answer[0] = "changed"
        completions[0][0]["content"] = "changed"
        completion_ids[0].clear()
        return [0.0]

    async def spoils_async(**kwargs):
        return spoils(**kwargs)

    def sees(prompts, completions, completion_ids, answer, meta, **kwargs):
        return [float((prompts, completions, completion_ids, answer, meta) == expected)]

    messages, meta = [{"role": "user", "content": "q"}], {"deep": ["a"]}
    expected = ([messages], [[{"role": "assistant", "content": "hi"}]], [[1, 2]], ["4"], [meta])
    row = rollout("hi", prompt=messages, answer="4", meta=meta)
    with RewardRunner([], reward_funcs=[spoils_async, spoils, sees]) as runner:
        assert runner.score([row])[0].parts["sees"] == 1.0
    assert messages == [{"role": "user", "content": "q"}] and meta == {"deep": ["a"]}


def test_a_fork_gives_no_second_answer(file):
    specs = [RewardSpec(function=f"{file}:{name}") for name in ("forks", "row_forks")]
    with RewardRunner(specs, on_error="skip", workers=1) as runner:
        for _ in range(2):
            scored = runner.score(rollouts("1", "2", "3", "4"))
            assert [s.parts["forks"] for s in scored] == [1.0] * 4
            assert [s.parts["row_forks"] for s in scored] == [1.0, 2.0, 3.0, 4.0]


def test_a_worker_that_stands_still_before_it_begins_is_replaced(file, monkeypatch):
    before = children()
    with RewardRunner([RewardSpec(function=f"{file}:pid")], on_error="skip", workers=1) as runner:
        first = int(runner.score(rollouts("a"))[0].parts["pid"])
        os.kill(first, signal.SIGSTOP)
        monkeypatch.setattr("llmrl.rewards.pool.START_SECONDS", 20.0)
        # Only the stopped one is old enough; its successor has its own time to start.
        pool = runner._functions[0].pool
        work = pool.start([{"rows": 1, "inputs": {"completion": "b"}}], 5.0, lambda m: m, lambda *a: a, retries=1)
        assert wait_until(lambda: pool._workers[0].state == "busy")
        pool._workers[0].since -= 20.0
        (answer,) = work.future.result(30)
        assert answer["result"]["outcomes"][0][1] != first
        assert not alive(first)
    assert children() == before


def test_extra_columns_are_plain_values_and_can_be_written_down(tmp_path):
    def logs(completions, log_extra, **kwargs):
        log_extra("odd", [{(1, 2): {3}, "half a pair": "\ud800", "what": object, "huge": 10**5000}])
        return [1.0]

    with RewardRunner([], reward_funcs=logs) as runner:
        (row,) = runner.score(rollouts("\udfff"))
    assert row.extra["odd"]["(1, 2)"] == [3]
    Records(tmp_path).add_samples(1, [{"completion": row.rollout.completion.text, "extra": dict(row.extra)}])
    (line,) = (tmp_path / "samples/step_00000001.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert "16610 bits" in found["extra"]["odd"]["huge"]
    assert found["completion"] == "\udfff" and found["extra"]["odd"]["half a pair"] == "\ud800"


def test_a_function_may_ask_for_the_step_where_nobody_trains():
    def progress(completions, trainer_state, **kwargs):
        return [trainer_state.global_step / trainer_state.max_steps + trainer_state["global_step"]]

    with RewardRunner([], reward_funcs=progress) as runner:
        assert runner.score(rollouts("a"))[0].reward == 0.0
        assert runner.score(rollouts("a"), {"global_step": 1, "max_steps": 4})[0].reward == 1.25
