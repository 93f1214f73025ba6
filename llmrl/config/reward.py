"""Which rewards, with what weight, under what limits."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llmrl.config.base import Strict, as_list


class RewardSpec(Strict):
    """One reward function: a built-in name, `module:function` or `path/file.py:function`. A bare string is its `function`.

    `args` are passed to it as keyword arguments. `timeout` is in seconds of work: for a row-wise verifier the deadline of one row,
    for a batch function the deadline of one call. `isolate: process` runs it in a worker that can be killed.
    """

    shorthand: ClassVar[str] = "function"

    function: str = Field(description="a built-in name, `module:function` or `path/file.py:function`")
    name: str | None = Field(None, description="name in metrics; default: the function's own")
    args: dict[str, Any] = Field({}, description="keyword arguments")
    weight: float = Field(1.0, description="factor in the combined reward")
    timeout: float | None = Field(None, gt=0, description="seconds; default 10 a row, 60 a batch call")
    isolate: Literal["process", "inline"] | None = Field(
        None, description="default: process; inline for the built-ins that can't hang"
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        description="address space of a worker beyond what loading took; default 4 for a row verifier, none for a batch function",
    )


Rewards = Annotated[list[RewardSpec], BeforeValidator(as_list)]


class RewardFields(Strict):
    """Rewards."""

    # What `stop` means: the run ends at the first row on which a function raised or answered malformed, and at a failed batch call.
    # A row verifier that ran out of time or memory did so because of what the model wrote, and one hostile answer must not end a
    # run: that row gets None, counted and logged; the run stops when more than half of the rows of a call, and more than 3, end so.
    rewards: Rewards = Field([], description="reward functions: a name, or a list of specs (`rewards.0.weight=0.5`)")
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="a reward function failed: stop, or None for the row (a verifier's timeout on a few rows never stops)",
    )
    reward_workers: int = Field(2, ge=1, description="worker processes of each training process")
