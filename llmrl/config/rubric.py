"""Rubrics, and the judge that grades by them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmrl.config.base import Strict


class Criterion(Strict):
    """One thing that an answer is graded for, and in which range."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="a word; the judge's verdict uses it as a key")
    description: str = Field(min_length=1, description="what the judge looks for, and what the ends of the range mean")
    range: list[float] = Field([0.0, 1.0], min_length=2, max_length=2, description="lowest and highest score")
    whole: bool = Field(False, description="whole numbers only")
    weight: float = Field(1.0, gt=0, description="factor of the score")
    negative: bool = Field(False, description="a fault: its score is subtracted, and it is not in the maximum")
    reference: str = Field("", description="text that this criterion is judged against")

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        low, high = self.range
        if not 0 <= low < high:
            raise ValueError(f"range {self.range} must be [lowest, highest] with 0 <= lowest < highest")
        if self.whole and not (low.is_integer() and high.is_integer()):
            raise ValueError(f"range {self.range} has ends that are no whole numbers, and `whole` is true")
        return self


class RubricExample(Strict):
    """An answer whose reward is known to lie between `min` and `max`; `llmrl judge-check` tries it."""

    prompt: str
    answer: str
    reference: str = ""
    min: float = Field(0.0, ge=0, le=1)
    max: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


class Rubric(Strict):
    """What a judge grades an answer by. reward = sum(weight x score) / sum(weight x highest score), faults subtracted, in [0, 1].

    `missing`: what a verdict without a usable score for a criterion is worth once the judge was asked again: "none", nothing (the row
    has no reward), or "zero", the verdict without that criterion's score.
    """

    criteria: list[Criterion] = Field(min_length=1)
    instructions: str = Field("", description="for the judge, beside the criteria")
    reference_column: str | None = Field(None, description="column of the data that holds a reference answer")
    missing: Literal["none", "zero"] = "none"
    examples: list[RubricExample] = Field([], description="answers with known bounds, for `llmrl judge-check`")

    @model_validator(mode="after")
    def _check_criteria(self) -> Self:
        names = [c.name for c in self.criteria]
        if double := [n for n in dict.fromkeys(names) if names.count(n) > 1]:
            raise ValueError(f"two criteria are called {double[0]!r}")
        if all(c.negative for c in self.criteria):
            raise ValueError("all criteria are negative, so no answer could earn anything; add one that is not")
        return self


class JudgeSettings(Strict):
    """Whom to ask, how, and how much of it: a model behind an OpenAI-compatible endpoint, or, without a `base_url`, one that each
    training process loads."""

    base_url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+",
        description="http://host:port or https://host/v1 of an OpenAI-compatible server; without it `model` is loaded in this process",
    )
    model: str = Field(min_length=1, description="name of the model there; without base_url, a directory or hub id")
    api_key_env: str | None = Field(
        None,
        description="environment variable with the key; without it a server on this machine gets the token that `llmrl serve` wrote, others none",
    )
    temperature: float | None = Field(0.0, ge=0, le=2, description="null: not sent")
    max_tokens: int = Field(1024, ge=1, description="of one verdict")
    explain: bool = Field(False, description="a reason before each score: better verdicts, more tokens")
    samples: int = Field(1, ge=1, le=32, description="verdicts an answer; their rewards are averaged")
    mode: Literal["score", "pairwise"] = Field(
        "score", description="pairwise: answers of a group are compared in both orders, the reward is the win rate"
    )
    opponents: int | None = Field(
        None, ge=1, description="pairwise: how many neighbours each answer is compared to; default: all"
    )
    concurrency: int | None = Field(
        None, ge=1, description="requests at once, of each training process; default: 16 at a server, else no limit"
    )
    timeout: float = Field(60.0, gt=0, description="of a server: seconds for one request")
    deadline: float | None = Field(
        None,
        gt=0,
        description="seconds for one row from its first request, retries included; default: 300 at a server, else none",
    )
    retries: int = Field(
        4, ge=0, description="of a server: further tries after 408, 429, 5xx, a lost connection or a timeout"
    )
    budget_calls: int | None = Field(None, ge=1, description="requests of each training process in one run")
    budget_tokens: int | None = Field(None, ge=1, description="tokens read and written, likewise")
    over_budget: Literal["stop", "none"] = Field("stop", description="none: the remaining rows get no reward")
    cache: str | None = Field(None, description="file that keeps verdicts over runs (SQLite)")
    max_answer_characters: int = Field(20000, ge=100, description="of a longer answer the judge sees both ends")

    @property
    def most_at_once(self) -> int | None:
        return self.concurrency or (16 if self.base_url else None)

    @property
    def row_seconds(self) -> float | None:
        return self.deadline or (300.0 if self.base_url else None)

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.base_url is not None:
            return self
        given = [n for n in ("api_key_env", "timeout", "retries") if n in self.model_fields_set]
        if given or self.temperature is None:
            raise ValueError(
                f"{', '.join(given) or 'temperature: null'} is for a judge at a server: give its `base_url`, or leave it out for a model "
                "that this process loads"
            )
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "several samples at temperature 0 are one verdict several times; set `temperature`, 0.7 say"
            )
        if self.samples > 1 and self.mode == "pairwise":
            raise ValueError("samples are of `mode: score`; pairwise asks twice already, once in each order")
        if self.opponents is not None and self.mode == "score":
            raise ValueError("opponents are of `mode: pairwise`")
        return self
