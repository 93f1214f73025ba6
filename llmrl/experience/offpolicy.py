"""How far off policy a step's rollouts are, and what to say when it is too far."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor

from llmrl.experience.collect import Gather
from llmrl.types import Completion, PackedBatch, ScoredRollout

logger = logging.getLogger("llmrl")
LOW_ESS = 0.5
_QUIET_STEPS = 100


def is_fresh(completion: Completion, version: int) -> bool:
    """All its tokens were sampled with the weights of `version`.

    Of a mixed completion no token is: the newer ones were sampled behind key-value states of the older weights.
    """
    return completion.version == version


def fresh_tokens(batch: PackedBatch) -> Tensor | None:
    """[K]: the scalar `fresh` of each token in the loss (`experience/batch.py`); None where rollouts are never stale."""
    flags = batch.scalars.get("fresh")
    return None if flags is None else flags[batch.sequence_of_positions()]


def staleness_metrics(rollouts: Iterable[ScoredRollout], version: int, gather: Gather) -> dict[str, float]:
    """How many versions older than `version` (the weights before this step's updates) the tokens' are, over all processes.

    `rollout/staleness/mean` and `/max` are over tokens, `rollout/mixed_versions` is the share of completions with tokens of several.
    Empty without completions.
    """
    tokens, total, oldest, mixed, count = 0, 0, 0, 0, 0
    for scored in rollouts:
        completion = scored.rollout.completion
        ages = [version - v for v in completion.versions] or [version - completion.version] * len(completion.ids)
        tokens, total = tokens + len(ages), total + sum(ages)
        oldest, mixed, count = max([oldest, *ages]), mixed + (len(set(ages)) > 1), count + 1
    parts = gather([tokens, total, oldest, mixed, count])
    tokens, total, mixed, count = (sum(part[i] for part in parts) for i in (0, 1, 3, 4))
    if not count:
        return {}
    return {
        "rollout/staleness/mean": total / max(tokens, 1),
        "rollout/staleness/max": float(max(part[2] for part in parts)),
        "rollout/mixed_versions": mixed / count,
    }


class SampleSizeWatch:
    """Warns when importance weights leave less than half of the tokens, at most every hundred steps.

    With `uncorrected`, stale rollouts go without weights, and that is said once.
    """

    def __init__(self, *, uncorrected: bool = False) -> None:
        self.uncorrected = uncorrected
        self._warned_at: int | None = None

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Looks at the metrics of a step; call it on one process."""
        if self.uncorrected:
            self.uncorrected = False
            logger.warning(
                "max_staleness is above 0 and importance_correction is none: stale rollouts are trained on as if the policy of now had "
                "sampled them, which is biased; leave importance_correction out, or use token_truncate"
            )
        ess = metrics.get("sampling/ess", 1.0)
        if ess < LOW_ESS and (self._warned_at is None or step - self._warned_at >= _QUIET_STEPS):
            self._warned_at = step
            logger.warning(
                "step %d: the effective sample size (sampling/ess) is %.2f of the tokens: few tokens have most of the weight, and the "
                "gradient is noisy. The rollouts are too far from the policy: lower rollout.max_staleness, learning_rate or importance_cap; "
                "where rollouts are not stale, see whether the engine computes in a coarser number type than the trainer",
                step,
                ess,
            )
