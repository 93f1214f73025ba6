"""The rollouts of a step do not depend on the number of processes, and refilling is bounded."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.data.sampler import Sampler
from llmrl.errors import LLMRLError, RolloutError
from llmrl.experience.batch import rollout_metrics
from llmrl.experience.collect import Collector, Group, zero_truncated
from llmrl.rewards import RewardRunner
from llmrl.types import Completion, Prompt, Rollout, Sampling, ScoredRollout
from tests.scorers import PlainScorer


class KeyedEngine:
    """Completions that depend on (step, prompt id, sample) alone, as a real engine's do."""

    version = 0

    def __init__(self):
        self.prompts_seen: list[str] = []

    def generate(self, prompts, num_generations, sampling, on_group=None):
        self.prompts_seen += [p.id for p in prompts]
        return [
            [
                Rollout(p, Completion((hash((p.id, sampling.step, i)) % 1000,), (-1.0,), "stop", p.id), i)
                for i in range(num_generations)
            ]
            for p in prompts
        ]

    def sync_weights(self, named_tensors, version):
        self.version = version


class Rule(PlainScorer):
    """Prompts with an even number get distinct rewards, odd ones equal rewards."""

    def score(self, rollouts, trainer_state=None):
        return [
            ScoredRollout(r, float(r.index) if int(r.prompt.columns["n"]) % 2 == 0 else 1.0, {"rule": 1.0})
            for r in rollouts
        ]


def prompts(n):
    return [Prompt(f"p{i}", (i + 1,), f"p{i}", {"n": i}) for i in range(n)]


def collector(n=40, engine=None, **settings):
    defaults = {"batch_size": 6, "num_generations": 3, "sampling": Sampling(8)}
    return Collector(
        prompts(n), Sampler(n, seed=1, shuffle=True), engine or KeyedEngine(), Rule(), **{**defaults, **settings}
    )


def parallel(world_size, engines=None, **settings):
    """The experiences of `world_size` processes, as threads that meet in gather."""
    barrier, board = threading.Barrier(world_size), [None] * world_size
    out = [None] * world_size

    def run(rank):
        def gather(value):
            board[rank] = value
            barrier.wait()
            everything = list(board)
            barrier.wait()
            return everything

        engine = engines[rank] if engines else None
        part = collector(rank=rank, world_size=world_size, gather=gather, engine=engine, **settings)
        try:
            out[rank] = part.collect(1)
        except LLMRLError as error:
            out[rank] = error

    threads = [threading.Thread(target=run, args=(r,)) for r in range(world_size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    return out


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_groups_on_any_number_of_processes(drop, world_size):
    settings = {"drop_zero_std": drop, "max_refills": 5}
    alone = collector(**settings).collect(1)
    parts = parallel(world_size, **settings)
    together = sorted((g for e in parts for g in e.groups), key=lambda g: g.index)
    assert [(g.index, [r.rollout for r in g.rollouts]) for g in together] == [
        (g.index, [r.rollout for r in g.rollouts]) for g in alone.groups
    ]
    assert all(e.metrics == alone.metrics for e in parts)


def test_a_failure_of_one_process_is_raised_by_all():
    class Broken(KeyedEngine):
        def generate(self, prompts, num_generations, sampling, on_group=None):
            raise RolloutError("logits are not finite")

    first, second = parallel(2, engines=[KeyedEngine(), Broken()])
    assert isinstance(second, RolloutError)
    assert isinstance(first, LLMRLError) and "process 1 failed: RolloutError: logits are not finite" in str(first)


def test_groups_without_signal_are_replaced():
    experience = collector(drop_zero_std=True, max_refills=20).collect(1)
    assert len(experience.groups) == 6 and all(g.informative for g in experience.groups)
    assert experience.metrics["groups/kept"] == 6 and experience.metrics["groups/dropped"] > 0


class Streaming(KeyedEngine):
    """Hands its groups over one by one, the last prompt's first."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def generate(self, prompts, num_generations, sampling, on_group=None):
        groups = super().generate(prompts, num_generations, sampling)
        for i in reversed(range(len(groups))):
            on_group(i, groups[i])
            self.calls.append("group")
        return groups


def even_rows(prompts, completions, n, log_metric, calls, **kwargs):
    """What `Rule` gives; notes that it was called, and logs how many rows it got."""
    calls.append("scored")
    log_metric("rows", len(completions))
    return [float(i % 3) if k % 2 == 0 else 1.0 for i, k in enumerate(n)]


def test_rewards_of_a_step_with_their_counts_over_all_rounds():
    calls = []
    with RewardRunner([], reward_funcs=[partial(even_rows, calls=calls)]) as runner:
        c = collector(engine=Streaming(calls), drop_zero_std=True, max_refills=20)
        c.scorer = runner
        first, second = c.collect(1), c.collect(2)
        runner.score([r.rollout for g in second.groups for r in g.rollouts])  # somebody else's
    alone = collector(drop_zero_std=True, max_refills=20).collect(1)
    assert [[r.reward for r in g.rollouts] for g in first.groups] == [
        [r.reward for r in g.rollouts] for g in alone.groups
    ]
    assert calls[:7] == ["group"] * 6 + ["scored"], "once a round, with all groups of it"
    for experience in (first, second):
        rounds, rows = experience.metrics["groups/rounds"], len(experience.sampled)
        assert experience.reward_metrics["reward_outcomes/even_rows/score"] == rows
        assert experience.reward_metrics["rows"] == pytest.approx(rows / rounds)


def test_an_engine_s_failure_ends_the_scoring(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\nfrom llmrl.rewards import row_verifier\n"
        "@row_verifier\ndef slow(completion):\n    time.sleep(60 if completion == 'p3' else 0)\n    return 1.0\n"
    )

    class Broken(Streaming):
        def generate(self, prompts, num_generations, sampling, on_group=None):
            super().generate(prompts, num_generations, sampling, on_group)
            raise RolloutError("the server is gone")

    with RewardRunner([RewardSpec(function=f"{path}:slow")], workers=1) as runner:
        c = collector(n=6, engine=Broken([]))
        c.scorer = runner
        begun = time.monotonic()
        with pytest.raises(RolloutError, match="the server is gone"):
            c.collect(1)
        rollout = Rollout(Prompt("x", (1,), "x"), Completion((1,), (-1.0,), "stop", "p1"))
        assert runner.score([rollout])[0].reward == 1.0
        assert time.monotonic() - begun < 20


def test_refilling_is_bounded():
    engine = KeyedEngine()
    c = collector(engine=engine, drop_zero_std=True, max_refills=2)
    c.prompts = [replace(p, columns={"n": 1}) for p in c.prompts]  # no prompt has any signal
    experience = c.collect(1)
    assert experience.groups == [] and len(engine.prompts_seen) == 3 * 6


def test_a_prompt_drawn_twice_in_a_step_is_sampled_with_other_randomness():
    engine = KeyedEngine()
    experience = collector(n=2, engine=engine, batch_size=4).collect(1)
    assert len(set(engine.prompts_seen)) == 4
    assert len({g.rollouts[0].rollout.completion.ids for g in experience.groups}) == 4


def test_informative_compares_exactly_and_ignores_missing_rewards():
    def group(*rewards):
        rollout = Rollout(Prompt("p", (1,), "p"), Completion((1,), (-1.0,), "stop", ""))
        return Group(0, [ScoredRollout(rollout, r, {}) for r in rewards])

    assert not group(0.1, 0.1, 0.1).informative
    assert not group(0.1, None, 0.1).informative and not group(None, None).informative
    assert group(0.1, 0.2).informative


def test_truncated_completions_can_earn_nothing():
    rollout = Rollout(Prompt("p", (1,), "p"), Completion((1,), (-1.0,), "length", ""))
    assert zero_truncated(ScoredRollout(rollout, 1.0, {})).reward == 0.0
    assert zero_truncated(ScoredRollout(rollout, None, {})).reward is None


def test_reward_std_is_that_of_groups_where_there_are_groups():
    def metrics(rewards):
        rows = [
            ScoredRollout(Rollout(p, Completion((5,), (-1.0,), "stop", "x"), i), r, {"rule": r})
            for p, rs in zip(prompts(2), rewards)
            for i, r in enumerate(rs)
        ]
        return rollout_metrics(rows, ["rule"], lambda value: [value])

    groups = metrics([[0.0, 2.0], [1.0, 1.0]])
    assert groups["reward_std"] == pytest.approx(2**0.5 / 2) and groups["frac_reward_zero_std"] == 0.5
    single = metrics([[0.0], [2.0]])
    assert single["reward_std"] == pytest.approx(2**0.5) and "frac_reward_zero_std" not in single
    assert metrics([[3.0], [None]])["reward_std"] == 0.0
