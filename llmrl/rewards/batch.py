"""Rollouts in the form that reward functions are called with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.errors import ConfigError
from llmrl.rewards.base import BATCH_INPUTS, ROW_INPUTS
from llmrl.types import Prompt, Rollout

logger = logging.getLogger("llmrl.rewards")
_SIMPLE = (str, int, float, bool, type(None))
# Names that are ours in either calling convention: a column of such a name is not forwarded.
_OURS = {*BATCH_INPUTS, *ROW_INPUTS}


class RewardBatch:
    """The rows of one scoring call as lists, TRL's way: a string a row, or messages where the prompt is conversational.

    A column that only some rows have is None in the others.
    """

    def __init__(self, rollouts: Sequence[Rollout], trainer_state: Mapping[str, Any] | None) -> None:
        self.rollouts = rollouts
        self.trainer_state = dict(trainer_state or {})
        self.texts = [r.completion.text for r in rollouts]
        self.prompts = [r.prompt.text for r in rollouts]
        self.completions: list[Any] = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(self.texts, self.prompts, strict=True)
        ]
        self.columns = columns_of([r.prompt for r in rollouts])

    def __len__(self) -> int:
        return len(self.rollouts)

    def batch_task(self, name: str, description: Mapping[str, Any], *, send: bool) -> dict[str, Any]:
        """The task of a batch function: only what it accepts. `send`: it must travel to a worker as JSON."""
        inputs = {"prompts": self.prompts, "completions": self.completions, "trainer_state": self.trainer_state}
        inputs |= (
            {"completion_ids": [list(r.completion.ids) for r in self.rollouts]}
            if _takes(description, "completion_ids")
            else {}
        )
        inputs = {k: v for k, v in inputs.items() if _takes(description, k)}
        return {"rows": len(self), "inputs": {**self._accepted(name, description, send), **inputs}}

    def row_tasks(self, name: str, description: Mapping[str, Any], *, send: bool) -> list[dict[str, Any]]:
        """The tasks of a row verifier, one a row."""
        columns = self._accepted(name, description, send)
        wanted = [n for n in ("prompt", "completion", "completion_ids", "trainer_state") if _takes(description, n)]
        tasks = []
        for i, rollout in enumerate(self.rollouts):
            own: dict[str, Any] = {
                "prompt": self.prompts[i],
                "completion": self.texts[i],
                "trainer_state": self.trainer_state,
            }
            if "completion_ids" in wanted:
                own["completion_ids"] = list(rollout.completion.ids)
            inputs = {n: own[n] for n in wanted}
            tasks.append({"rows": 1, "inputs": {**{k: v[i] for k, v in columns.items()}, **inputs}})
        return tasks

    def _accepted(self, name: str, description: Mapping[str, Any], send: bool) -> dict[str, list[Any]]:
        accepted = accepted_columns(self.columns, name, description)
        return sendable_columns(accepted, name, description) if send else accepted


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """name -> a value a prompt (None where a row lacks the column)."""
    names = dict.fromkeys(k for p in prompts for k in p.columns if k not in _OURS)
    return {k: [p.columns.get(k) for p in prompts] for k in names}


def accepted_columns(
    columns: Mapping[str, list[Any]], name: str, description: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """The columns that the function takes. Raises ConfigError when it needs one that no row has."""
    missing = [c for c in description["columns"] if c not in columns]
    if missing:
        raise ConfigError(
            f"reward function {name!r} needs the column {', '.join(map(repr, missing))}, which no row has; the rows have "
            f"{', '.join(sorted(columns)) or 'no columns besides the prompt'}. Rename one under `dataset: columns`, "
            "give the parameter a default, or set it under `args`"
        )
    return {k: v for k, v in columns.items() if _takes(description, k)}


def sendable_columns(
    columns: Mapping[str, list[Any]], name: str, description: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """The columns that JSON can hold. One that can't raises ConfigError if the function names it, and is left out if it only comes
    in through **kwargs."""
    kept = {}
    for column, values in columns.items():
        problem = _unsendable(values)
        if problem is None:
            kept[column] = values
        elif column in description["names"]:
            raise ConfigError(
                f"reward function {name!r} runs in a worker process, to which column {column!r} can't be sent ({problem}). "
                "Set `isolate: inline` for it, or store the column as text or numbers"
            )
        else:
            logger.debug("column %r is not passed to reward function %r: %s", column, name, problem)
    return kept


def _takes(description: Mapping[str, Any], name: str) -> bool:
    return description["any_keyword"] or name in description["names"]


def _unsendable(values: list[Any]) -> str | None:
    if all(isinstance(v, _SIMPLE) for v in values):
        return None
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
