"""Rollouts made ahead: which weights they may begin with, their order, what is raised where, and how it ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from llmrl.data.sampler import Sampler
from llmrl.errors import LLMRLError, RolloutError
from llmrl.experience import ahead as module
from llmrl.experience.ahead import Ahead
from llmrl.experience.collect import Collector, Experience
from llmrl.train.collectives import Collectives
from llmrl.types import Completion, Prompt, Rollout, Sampling, ScoredRollout
from tests.processes import run_processes
from tests.scorers import PlainScorer

ROOT = Path(__file__).resolve().parents[2]
SOON = 5.0  # a bound for what takes milliseconds


class Maker:
    """`collect` that can be held up: `begun` lists the steps that it was called with, `go` lets one more of them finish."""

    def __init__(self, held=False):
        self.begun, self.go, self.held, self.fail = [], threading.Semaphore(0), held, {}
        self.sampler = Sampler(1000, shuffle=False)
        self.thread = None

    def __call__(self, step):
        self.thread = threading.current_thread()
        self.begun.append(step)
        taken = self.sampler.take(3)
        if self.held:
            self.go.acquire()
        if step in self.fail:
            raise self.fail[step]
        return Experience(step, [], {"first": float(taken[0])})

    def wait_begun(self, count):
        end = time.monotonic() + SOON
        while len(self.begun) < count and time.monotonic() < end:
            time.sleep(0.001)
        assert len(self.begun) == count


@pytest.fixture
def start():
    made = []

    def start(maker, **settings):
        defaults = {"max_staleness": 1, "first_step": 1, "last_step": 10, "cursor": maker.sampler.state_dict}
        made.append((Ahead(maker, **{**defaults, **settings}), maker))
        return made[-1][0]

    yield start
    for ahead, maker in made:
        maker.held = False
        maker.go.release(100)
        ahead.close()


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_a_step_begins_with_no_older_weights_than_allowed(start, staleness):
    maker = Maker()
    ahead = start(maker, max_staleness=staleness, last_step=12)
    time.sleep(0.02)
    assert maker.begun == []  # not even the first, before there are weights
    held = 0
    for step in range(1, 13):
        ahead.allow(step - 1)  # the weights after step - 1 steps are on the engine
        last = min(step + staleness, 12)
        maker.wait_begun(last)
        time.sleep(0.005)
        assert maker.begun == list(range(1, last + 1))
        experience, _ = ahead.take(step)
        assert experience.step == step
        held = max(held, len(maker.begun) - step + 1)  # the one that is trained on, and all later ones
    assert held == staleness + 1
    ahead._thread.join(SOON)
    assert not ahead._thread.is_alive() and maker.begun[-1] == 12  # nothing beyond the last step


def test_it_resumes_in_the_middle(start):
    maker = Maker()
    ahead = start(maker, max_staleness=2, first_step=7, last_step=8)
    ahead.allow(3)
    time.sleep(0.01)
    assert maker.begun == []
    ahead.allow(6)
    assert [ahead.take(s)[0].step for s in (7, 8)] == [7, 8]


def test_an_older_version_takes_nothing_back(start):
    maker = Maker()
    ahead = start(maker)
    ahead.allow(2)
    ahead.allow(0)
    maker.wait_begun(4)


def test_the_cursor_is_that_of_what_was_consumed(start):
    maker = Maker()
    ahead = start(maker, max_staleness=3)
    ahead.allow(0)
    maker.wait_begun(4)
    _, cursor = ahead.take(1)
    assert (cursor["position"], maker.sampler.state_dict()["position"]) == (3, 12)
    # A run that resumes from it draws what this one drew for step 2.
    resumed = Maker()
    resumed.sampler.load_state_dict(cursor)
    again = start(resumed, first_step=2)
    again.allow(1)
    assert again.take(2)[0].metrics["first"] == ahead.take(2)[0].metrics["first"] == 3.0


def test_what_the_thread_raises_comes_at_its_own_step(start):
    maker = Maker()
    maker.fail[3] = RolloutError("the server is gone")
    ahead = start(maker, max_staleness=4)
    ahead.allow(0)
    maker.wait_begun(3)
    assert [ahead.take(s)[0].step for s in (1, 2)] == [1, 2]
    for _ in range(2):
        with pytest.raises(RolloutError) as caught:
            ahead.take(3)
        assert caught.value is maker.fail[3]
    assert any(frame.name == "__call__" for frame in traceback.extract_tb(caught.value.__traceback__))
    time.sleep(0.01)
    assert maker.begun == [1, 2, 3]


def test_seconds_of_making(start):
    maker = Maker(held=True)
    ahead = start(maker)
    ahead.allow(0)
    threading.Timer(0.04, maker.go.release).start()
    assert 0.02 < ahead.take(1)[0].metrics["rollout/making_seconds"] < SOON


def test_steps_out_of_order_and_ones_that_could_never_come_are_refused(start):
    ahead = start(Maker(), last_step=2)
    with pytest.raises(ValueError, match="waited for forever"):
        ahead.take(1)
    ahead.allow(5)
    with pytest.raises(ValueError, match="step 2 is not the next one, 1"):
        ahead.take(2)
    ahead.take(1), ahead.take(2)
    with pytest.raises(ValueError, match="the last is 2"):
        ahead.take(3)
    with pytest.raises(ValueError, match="call collect itself"):
        Ahead(Maker(), max_staleness=0, first_step=1, last_step=1, cursor=dict)


def test_closing_ends_the_thread_between_steps(start):
    maker = Maker(held=True)
    ahead = start(maker, max_staleness=5)
    ahead.allow(0)
    maker.wait_begun(1)
    threading.Timer(0.02, maker.go.release).start()
    ahead.close()
    ahead.close()
    assert not ahead._thread.is_alive() and maker.begun == [1] and ahead.closing.is_set()


def test_closing_does_not_wait_for_a_thread_that_waits_itself(start):
    maker = Maker()
    ahead = start(maker)
    began = time.monotonic()
    ahead.close()
    assert not ahead._thread.is_alive() and time.monotonic() - began < 1 and maker.begun == []


def test_closing_leaves_a_step_that_hangs(start, monkeypatch):
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.02)
    maker = Maker(held=True)
    ahead = start(maker)
    ahead.allow(0)
    maker.wait_begun(1)
    ahead.close()
    assert ahead._thread.is_alive() and ahead._thread.daemon


@pytest.mark.parametrize("end", ["return", "raise SystemExit(7)", "os.kill(os.getpid(), signal.SIGINT); ahead.take(1)"])
def test_a_process_exits_with_a_step_that_hangs(end):
    code = f"""
import os, signal, threading
from llmrl.experience import ahead as module
module.JOIN_SECONDS = 0.05
begun = threading.Event()
def collect(step):
    begun.set()
    threading.Event().wait()
def main():
    ahead = module.Ahead(collect, max_staleness=1, first_step=1, last_step=5, cursor=dict)
    ahead.allow(0)
    begun.wait()
    try:
        {end}
    finally:
        ahead.close()
main()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    expected = {"return": 0, "raise SystemExit(7)": 7}.get(end, -2)
    assert done.returncode == expected, done.stderr


def test_ctrl_c_reaches_a_main_thread_that_waits(start):
    maker = Maker(held=True)
    ahead = start(maker)
    ahead.allow(0)
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ahead.take(1)
    maker.go.release()
    assert ahead.take(1)[0].step == 1  # and the interrupted wait lost nothing


class SlowEngine(PlainScorer):
    """Answers late, by another time on every process; on the one of `fail` it raises at that step."""

    version = 0

    def __init__(self, rank, fail=(None, None)):
        self.rank, self.fail, self.random = rank, fail, random.Random(rank)

    def generate(self, prompts, num_generations, sampling, on_group=None):
        time.sleep(self.random.uniform(0, 0.004))
        if (self.rank, sampling.step) == self.fail:
            raise RolloutError("the server is gone")
        return [
            [Rollout(p, Completion((sampling.step, i), (-1.0, -1.0), "stop", ""), i) for i in range(num_generations)]
            for p in prompts
        ]

    def score(self, rollouts, trainer_state=None):
        return [ScoredRollout(r, float(r.index * (int(r.prompt.id) % 2)), {}) for r in rollouts]


def ahead_of(rank, steps, fail=(None, None)):
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    main = Collectives(rank, 2, torch.device("cpu"))
    side = main.second_channel()
    sampler = Sampler(40, seed=3)
    engine = SlowEngine(rank, fail)
    collector = Collector(
        [Prompt(str(i), (1,), "") for i in range(40)], sampler, engine, engine,
        batch_size=3, num_generations=2, sampling=Sampling(2), drop_zero_std=True, max_refills=3,
        rank=rank, world_size=2, gather=side.gather_json,
    )  # fmt: skip
    ahead = Ahead(
        collector.collect, max_staleness=2, first_step=1, last_step=steps, cursor=sampler.state_dict,
        gather=side.gather_json,
    )  # fmt: skip
    return main, ahead


def interleaved():
    rank, steps = int(os.environ["RANK"]), 40
    main, ahead = ahead_of(rank, steps)
    chance = random.Random(100 + rank)
    kept = 0.0
    for step in range(1, steps + 1):
        ahead.allow(step - 1)
        experience, cursor = ahead.take(step)
        for i in range(8):  # the trainer's own, while the thread gathers
            if chance.random() < 0.3:
                time.sleep(chance.uniform(0, 0.003))
            assert main.global_sum([step * 100.0 + i, rank]) == [2 * (step * 100.0 + i), 1.0]
        everyone = main.gather_json(
            {"step": experience.step, "cursor": cursor, "groups": [g.index for g in experience.groups]}
        )
        assert [e["step"] for e in everyone] == [step, step] and everyone[0]["cursor"] == everyone[1]["cursor"]
        both = everyone[0]["groups"] + everyone[1]["groups"]
        assert len(set(both)) == len(both) == experience.metrics["groups/kept"]
        assert {r.rollout.completion.ids[0] for r in experience.rollouts} <= {step}
        kept += experience.metrics["groups/kept"]
    assert kept > 2 * steps  # groups were dropped and refilled, in several rounds
    ahead.close()
    assert not ahead._thread.is_alive()
    main.barrier()
    torch.distributed.destroy_process_group()  # as the backend does: a process that just ends can abort in gloo's threads


@pytest.mark.slow
def test_two_processes_train_and_collect_without_mixing():
    run_processes(interleaved, 2, timeout=60)


def ended_early():
    rank = int(os.environ["RANK"])
    # A step fails on one process: both learn it, at that step.
    main, ahead = ahead_of(rank, 9, fail=(1, 3))
    for step in (1, 2):
        ahead.allow(step - 1)
        ahead.take(step)
    with pytest.raises(LLMRLError, match="the server is gone") as caught:
        ahead.take(3)
    assert isinstance(caught.value, RolloutError) == (rank == 1)
    ahead.close()
    # The main thread of one ends: the other does not wait for it.
    main, ahead = ahead_of(rank, 9)
    ahead.allow(0)
    ahead.take(1)
    main.barrier()
    if rank == 0:
        ahead.close()
    else:
        with pytest.raises(LLMRLError, match=r"no rollouts for step [34]: the run ended on process 0"):
            for step in range(2, 10):
                ahead.allow(step - 1)
                ahead.take(step)
        ahead.close()
    assert not ahead._thread.is_alive()
    # Both end in the middle of a step: their threads leave together.
    main, ahead = ahead_of(rank, 9)
    ahead.allow(0)
    time.sleep(0.002 * rank)
    ahead.close()
    assert not ahead._thread.is_alive()


@pytest.mark.slow
def test_what_ends_one_process_reaches_the_other():
    run_processes(ended_early, 2, timeout=60)


def test_one_process_needs_no_second_channel():
    side = Collectives(0, 1, torch.device("cpu")).second_channel()
    assert side.gather_json({"a": 1}) == [{"a": 1}] and side.group is None
