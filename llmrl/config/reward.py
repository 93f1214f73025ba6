"""Which rewards, with what weight, under what limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmrl.config.base import Strict


class RewardSpec(Strict):
    """One reward function: a built-in name, `module:function` or `path/file.py:function`.

    `args` are passed to it as keyword arguments. `timeout` is in seconds of work: for a row-wise verifier the deadline of one row,
    for a batch function the deadline of one call. `isolate: process` runs it in a worker that can be killed.
    """

    function: str
    name: str | None = Field(None, description="name in metrics; default: the function's own")
    args: dict[str, Any] = {}
    weight: float = 1.0
    timeout: float | None = Field(None, gt=0, description="seconds; default 10 a row, 60 a batch call")
    isolate: Literal["process", "inline"] | None = Field(None, description="default: process for named functions")


def _as_specs(value: Any) -> Any:
    if isinstance(value, str | dict | RewardSpec):
        value = [value]
    if isinstance(value, list):
        return [{"function": item} if isinstance(item, str) else item for item in value]
    return value


Rewards = Annotated[list[RewardSpec], BeforeValidator(_as_specs)]


class RewardFields(Strict):
    """The reward part of an RL recipe, flat at its top level."""

    rewards: Rewards = []
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a reward function that raised, ran out of time or answered malformed: stop, or None for the row"
    )
    reward_workers: int = Field(2, ge=1)
