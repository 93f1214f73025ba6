"""Groups change processes so that training takes all of them equally long: who sampled a group need not train on it.

Completions differ in length by far more than prompts do, and a step lasts as long as its slowest process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from llmrl.experience.collect import Experience, Gather, Group
from llmrl.types import Completion, Prompt, Rollout, ScoredRollout

_GAIN = 0.02  # a move must take this share of the mean load off the heaviest process: moved groups have to be sent


def balanced(
    experience: Experience, cost: Callable[[Group], float], *, updates: int, rank: int, world_size: int, gather: Gather
) -> Experience:
    """The experience with its kept groups spread anew over the processes, each update's by themselves; in one process as it is.

    `cost(group)` is what training on it takes, in any unit. What was dropped, and all that was counted, stays where it is. Groups
    that move leave behind the columns of their rows, which nothing in training reads.
    """
    if world_size == 1:
        return experience
    costs = gather([[g.index, cost(g)] for g in experience.groups])
    homes = {int(index): owner for owner, part in enumerate(costs) for index, _ in part}
    of = {int(index): float(value) for part in costs for index, value in part}
    new = dict(homes)
    for block in np.array_split(sorted(homes), updates):  # as `split_updates` cuts them
        new |= spread({int(i): of[int(i)] for i in block}, {int(i): homes[int(i)] for i in block}, world_size)
    leaving = [g for g in experience.groups if new[g.index] != rank]
    arrived = [
        _read(plain) for part in gather([_plain(g) for g in leaving]) for plain in part if new[plain["index"]] == rank
    ]
    staying = [g for g in experience.groups if new[g.index] == rank]
    return replace(experience, groups=sorted([*staying, *arrived], key=lambda g: g.index))


def spread(costs: Mapping[int, float], homes: Mapping[int, int], world_size: int) -> dict[int, int]:
    """item -> process: from where they are, one by one from the heaviest process to the lightest while that helps.

    The same on every process, given the same arguments.
    """
    owner = dict(homes)
    loads = [sum(costs[i] for i in costs if owner[i] == r) for r in range(world_size)]
    least = _GAIN * sum(loads) / world_size
    for _ in range(len(costs) * world_size):
        heavy, light = int(np.argmax(loads)), int(np.argmin(loads))
        gap = loads[heavy] - loads[light]
        # The move that leaves the two closest together; one as large as the gap would only change their roles.
        movable = [i for i in sorted(costs) if owner[i] == heavy and 0 < costs[i] < gap]
        if not movable:
            break
        best = min(movable, key=lambda i: abs(gap - 2 * costs[i]))
        if min(costs[best], gap - costs[best]) < least:
            break
        owner[best] = light
        loads[heavy] -= costs[best]
        loads[light] += costs[best]
    return owner


def _plain(group: Group) -> dict[str, Any]:
    """What JSON can hold; of what a reward function noted and JSON can't, the text."""
    bare = [replace(r.rollout, prompt=replace(r.rollout.prompt, columns={})) for r in group.rollouts]
    rows = [asdict(replace(r, rollout=rollout)) for r, rollout in zip(group.rollouts, bare)]
    return json.loads(json.dumps({"index": group.index, "rollouts": rows}, default=str))  # type: ignore[no-any-return]


def _read(plain: Mapping[str, Any]) -> Group:
    return Group(plain["index"], [_scored(row) for row in plain["rollouts"]])


def _scored(row: Mapping[str, Any]) -> ScoredRollout:
    rollout = row["rollout"]
    prompt, completion = rollout["prompt"], rollout["completion"]
    made = Rollout(
        Prompt(**{**prompt, "ids": tuple(prompt["ids"])}),
        Completion(**{name: _tuples(value) for name, value in completion.items()}),
        rollout["index"],
    )
    return ScoredRollout(**{**row, "rollout": made})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
