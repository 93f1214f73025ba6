"""Groups move between processes so that training lasts equally long, and arrive whole."""

from __future__ import annotations

import numpy as np
import pytest

from llmrl.experience.balance import balanced, spread
from llmrl.experience.collect import Experience
from tests.algorithms.recorded import recorded_groups


def loads(costs, owner, world_size):
    return [sum(c for i, c in costs.items() if owner[i] == r) for r in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_loads_come_close_together(world_size, seed):
    rng = np.random.default_rng(seed)
    costs = {i: float(c) for i, c in enumerate(rng.lognormal(0, 1.0, 16 * world_size))}
    homes = {i: i % world_size for i in costs}
    before, after = (loads(costs, owner, world_size) for owner in (homes, spread(costs, homes, world_size)))
    mean = sum(costs.values()) / world_size
    assert max(after) <= max(before)
    assert max(after) <= max(1.1 * mean, max(costs.values()) + 1e-9)


def test_what_is_even_stays():
    homes = {i: i % 2 for i in range(6)}
    assert spread(dict.fromkeys(range(6), 1.0), homes, 2) == homes
    assert spread({0: 1.0, 1: 1.01}, {0: 0, 1: 1}, 2) == {0: 0, 1: 1}


def test_one_heavy_group_is_left_alone_with_its_process():
    costs = {0: 10.0, 1: 1.0, 2: 1.0, 3: 1.0}
    assert spread(costs, {0: 0, 1: 1, 2: 0, 3: 1}, 2) == {0: 0, 1: 1, 2: 1, 3: 1}


def cost(group):
    return float(sum(len(r.rollout.completion.ids) for r in group.rollouts))


def together(experiences, updates=1):
    """Every process's result, in one process: each `gather` is answered with what the others would give."""
    said = [[] for _ in experiences]
    results = []
    for _ in range(3):  # each pass knows the answers to one more gather
        results, new = [], []
        for rank, experience in enumerate(experiences):
            mine = []

            def gather(value, mine=mine, said=said):
                mine.append(value)
                turn = len(mine) - 1
                return [said[r][turn] if turn < len(said[r]) else [] for r in range(len(said))]

            try:
                results.append(
                    balanced(experience, cost, updates=updates, rank=rank, world_size=len(experiences), gather=gather)
                )
            except KeyError:  # an answer that is not known yet
                results.append(None)
            new.append(mine)
        said = new
    return results


def test_groups_arrive_whole_and_nobody_loses_or_gains_one():
    groups = recorded_groups(8, seed=3)
    long = [g for g in groups if g.index in (0, 2, 4, 6)]
    experiences = [Experience(1, long), Experience(1, [g for g in groups if g.index % 2])]
    found = together(experiences)
    assert sorted(g.index for e in found for g in e.groups) == list(range(8))
    before, after = ([sum(map(cost, e.groups)) for e in part] for part in (experiences, found))
    assert max(after) - min(after) <= max(before) - min(before)
    for experience in found:
        assert [g.index for g in experience.groups] == sorted(g.index for g in experience.groups)
        for group in experience.groups:
            assert group.rollouts == groups[group.index].rollouts


def test_each_update_is_spread_by_itself():
    groups = recorded_groups(8, seed=3)
    experiences = [Experience(1, groups[:4]), Experience(1, groups[4:])]  # an update's groups all with one process
    found = together(experiences, updates=2)
    for block in (range(4), range(4, 8)):
        assert all(any(g.index in block for g in e.groups) for e in found)


def test_one_process_keeps_its_experience():
    experience = Experience(1, recorded_groups(3))
    assert balanced(experience, cost, updates=1, rank=0, world_size=1, gather=lambda v: [v]) is experience
