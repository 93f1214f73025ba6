"""A scorer for tests that care about the scores alone."""

from __future__ import annotations


class PlainScorer:
    """Made from `score(rollouts, trainer_state)` of a subclass; one call a session, when it ends."""

    def session(self, prompts, trainer_state=None, tally=None):
        return _Session(self, trainer_state)


class _Session:
    def __init__(self, scorer, trainer_state):
        self.scorer, self.trainer_state = scorer, trainer_state

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def add(self, index, group):
        pass

    def finish(self, groups):
        scored = iter(self.scorer.score([r for g in groups for r in g], self.trainer_state))
        return [[next(scored) for _ in g] for g in groups]
