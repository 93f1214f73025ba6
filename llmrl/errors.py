"""Errors that llmrl raises on purpose. Each message says what was given, why it can't work and what to do."""


class LLMRLError(Exception):
    """Base of every error that llmrl raises on purpose."""


class ConfigError(LLMRLError):
    """A recipe, an override or a combination of settings that can't work."""


class DataError(LLMRLError):
    """A data file, a row or a column that can't be trained or evaluated on."""


class RolloutError(LLMRLError):
    """A rollout engine that failed, or answered with something that can't be trained on."""


class SyncError(RolloutError):
    """An engine that does not hold the weights which it was sent."""


class RewardError(LLMRLError):
    """A reward function that can't be loaded, raised, ran out of time or returned the wrong thing."""


class DivergenceError(LLMRLError):
    """Training left the finite numbers, or sampler and trainer disagree beyond the bound."""
