"""What judges share: what they raise, what asking cost, and how much of it a run may have."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from llmrl.config.rubric import JudgeSettings
from llmrl.errors import RewardError
from llmrl.rewards.base import ERROR

logger = logging.getLogger("llmrl.rewards")


class JudgeError(RewardError):
    """A judge gave no verdict. `kind` is the row's outcome; `row_caused`: it is put down to the row, not to the judge."""

    def __init__(self, message: str, kind: str = ERROR, row_caused: bool = False) -> None:
        super().__init__(message)
        self.kind, self.row_caused = kind, row_caused


class BudgetSpent(JudgeError):
    """The budget of calls or tokens is used up."""


@dataclass
class Meter:
    """What asking cost, since it was last taken."""

    requests: int = 0
    retries: int = 0
    seconds: float = 0.0  # summed over requests that were answered
    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class MeteredJudge:
    """The part of a `Judge` (llmrl.types) that counts: a budget for the run, a meter for the step. One event loop calls it."""

    together: ClassVar[bool] = False
    """Whether the questions of a scoring call come all at once, when its answers are sampled; else each group's as it is finished."""

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings, self.meter = settings, Meter()
        self._calls, self._tokens, self._said = 0, 0, False

    async def close(self) -> None:
        """Lets go of connections."""

    def _pay(self) -> None:
        """Counts a request. Raises BudgetSpent instead, and warns once."""
        calls, tokens = self.settings.budget_calls, self.settings.budget_tokens
        if (calls is not None and self._calls >= calls) or (tokens is not None and self._tokens >= tokens):
            text = (
                f"the judge's budget is spent after {self._calls} calls and {self._tokens} tokens (budget_calls {calls}, budget_tokens "
                f"{tokens}). Raise it, or set `over_budget: none` to train on without these rewards"
            )
            if not self._said and self.settings.over_budget == "none":
                logger.warning("%s", text)
            self._said = True
            raise BudgetSpent(text)
        self._calls += 1
        self.meter.requests += 1

    def _count(self, read: int, written: int, seconds: float) -> None:
        """Counts an answer: tokens read and written, seconds from the request to it."""
        self.meter.seconds += seconds
        self.meter.answered += 1
        self.meter.prompt_tokens += read
        self.meter.completion_tokens += written
        self._tokens += read + written
