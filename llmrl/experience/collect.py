"""Sample, score, filter, refill: one step's rollouts, the same whatever the number of processes.

Every process draws the same prompts from the sampler and samples its own share of them; what must be agreed (which groups stay)
goes through `gather`. Dynamic sampling is DAPO's (Yu et al. 2025, arXiv 2503.14476), with a bound on the rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from llmrl.errors import together
from llmrl.rewards.tally import Tally
from llmrl.types import Prompt, Rollout, RolloutEngine, Sampling, ScoredRollout

Gather = Callable[[Any], list[Any]]


class Session(Protocol):
    """One call's scoring (`llmrl.rewards.session.ScoringSession`): groups may be added as they finish; `finish` takes them all."""

    def __enter__(self) -> Session: ...

    def __exit__(self, *exception: Any) -> None: ...

    def add(self, index: int, group: list[Rollout]) -> None: ...

    def finish(self, groups: Sequence[Sequence[Rollout]]) -> list[list[ScoredRollout]]: ...


class Scorer(Protocol):
    """What scores the groups of some prompts (`llmrl.rewards.runner.RewardRunner`)."""

    def session(self, prompts: Sequence[Prompt], trainer_state: Any = None, tally: Tally | None = None) -> Session: ...


class PromptSampler(Protocol):
    def take(self, k: int) -> list[int]: ...


@dataclass(frozen=True)
class Group:
    """The scored completions of one prompt; `index` is its place among all prompts drawn in this step, over all processes."""

    index: int
    rollouts: list[ScoredRollout]

    @property
    def informative(self) -> bool:
        """Whether the rewards differ at all: by exact comparison, since the std of equal numbers need not come out as 0."""
        return len({r.reward for r in self.rollouts if r.reward is not None}) > 1


@dataclass(frozen=True)
class Experience:
    """This process's groups of one step, kept and dropped ones, and how many were drawn and dropped over all processes.

    `reward_metrics` is what this process's scoring counted (`llmrl.rewards.tally.Tally.metrics`).
    """

    step: int
    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)
    dropped: list[Group] = field(default_factory=list)
    reward_metrics: dict[str, float] = field(default_factory=dict)

    @property
    def rollouts(self) -> list[ScoredRollout]:
        return [r for g in self.groups for r in g.rollouts]

    @property
    def sampled(self) -> list[ScoredRollout]:
        """Those of dropped groups too."""
        return [r for g in [*self.groups, *self.dropped] for r in g.rollouts]


def zero_truncated(scored: ScoredRollout) -> ScoredRollout:
    """Reward 0 for a completion that the token limit cut (Open-Reasoner-Zero, arXiv 2503.24290)."""
    if scored.reward is not None and scored.rollout.completion.finish_reason == "length":
        return replace(scored, reward=0.0)
    return scored


class Collector:
    """Makes the `Experience` of a step.

    `batch_size` prompts with `num_generations` completions each, over all processes. With `drop_zero_std`, groups whose rewards
    are all equal are replaced by new prompts, in at most `max_refills` further rounds; a step may then end with fewer groups.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampler: PromptSampler,
        engine: RolloutEngine,
        scorer: Scorer,
        *,
        batch_size: int,
        num_generations: int,
        sampling: Sampling,
        drop_zero_std: bool = False,
        max_refills: int = 0,
        zero_reward_if_truncated: bool = False,
        rank: int = 0,
        world_size: int = 1,
        gather: Gather | None = None,
    ) -> None:
        self.prompts, self.sampler, self.engine, self.scorer = prompts, sampler, engine, scorer
        self.batch_size, self.num_generations, self.sampling = batch_size, num_generations, sampling
        self.drop_zero_std, self.max_refills = drop_zero_std, max_refills
        self.zero_reward_if_truncated = zero_reward_if_truncated
        self.rank, self.world_size = rank, world_size
        self.gather: Gather = gather or (lambda value: [value])

    def collect(self, step: int, trainer_state: Any = None) -> Experience:
        """Samples and scores until `batch_size` groups are kept or the rounds are used up.

        What the engine or the scorer raises passes; on the other processes it is an LLMRLError that says whose error it was.
        """
        kept: dict[int, bool] = {}  # draw index -> kept, over all processes
        mine: list[Group] = []
        seen: Counter[str] = Counter()
        tally = Tally()
        drawn = rounds = 0
        while (missing := self.batch_size - sum(kept.values())) > 0 and rounds <= self.max_refills:
            draws = [self._distinct(self.prompts[i], seen) for i in self.sampler.take(missing)]
            share = [(drawn + j, p) for j, p in enumerate(draws) if (drawn + j) % self.world_size == self.rank]
            groups = together(partial(self._sample, share, step, trainer_state, tally), self.gather)
            mine += groups
            drawn += len(draws)
            rounds += 1
            if not self.drop_zero_std:
                kept = dict.fromkeys(range(drawn), True)
                break
            for flags in self.gather([[g.index, g.informative] for g in groups]):
                kept.update({int(i): bool(flag) for i, flag in flags})
        groups, dropped = ([g for g in mine if kept[g.index] is flag] for flag in (True, False))
        n_kept = sum(kept.values())
        metrics = {
            "groups/kept": float(n_kept),
            "groups/dropped": float(drawn - n_kept),
            "groups/rounds": float(rounds),
        }
        return Experience(step, groups, metrics if self.drop_zero_std else {}, dropped, tally.metrics())

    def _sample(self, share: list[tuple[int, Prompt]], step: int, trainer_state: Any, tally: Tally) -> list[Group]:
        """Samples and scores this process's share of a round; finished groups are scored while others are still sampled."""
        prompts = [p for _, p in share]
        with self.scorer.session(prompts, trainer_state, tally) as session:
            sampling = replace(self.sampling, step=step)
            groups = self.engine.generate(prompts, self.num_generations, sampling, on_group=session.add)
            scored = session.finish(groups)
        if self.zero_reward_if_truncated:
            scored = [[zero_truncated(r) for r in rows] for rows in scored]
        return [Group(index, rows) for (index, _), rows in zip(share, scored, strict=True)]

    @staticmethod
    def _distinct(prompt: Prompt, seen: Counter[str]) -> Prompt:
        """A prompt drawn twice in one step gets another id, so that its second group is sampled with other random numbers."""
        seen[prompt.id] += 1
        return prompt if seen[prompt.id] == 1 else replace(prompt, id=f"{prompt.id}#{seen[prompt.id]}")
