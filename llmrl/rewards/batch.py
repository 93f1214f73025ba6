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
# Where nobody trains (trying a recipe, evaluating a model): the same keys as in a run, so that functions that read them work.
_NO_RUN = {"global_step": 0, "max_steps": 1}
_SIMPLE = (str, int, float, bool, type(None))
# Names that are ours in either calling convention: a column of such a name is not forwarded.
_OURS = {*BATCH_INPUTS, *ROW_INPUTS}


class RewardInputs:
    """What reward functions are told about the prompts of one scoring call: a string a row, or messages where the prompt is
    conversational (TRL's way), and the columns. A column that only some prompts have is None in the others.
    """

    def __init__(self, prompts: Sequence[Prompt], trainer_state: Mapping[str, Any] | None) -> None:
        self.trainer_state = {**_NO_RUN, **(trainer_state or {})}
        self._columns = columns_of(prompts)

    def columns(self, name: str, description: Mapping[str, Any], *, send: bool) -> dict[str, list[Any]]:
        """name -> a value a prompt: those that the function takes. `send`: they must travel to a worker as JSON."""
        accepted = accepted_columns(self._columns, name, description)
        return sendable_columns(accepted, name, description) if send else accepted

    def batch_task(
        self, groups: Sequence[Sequence[Rollout]], columns: Mapping[str, list[Any]], description: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The task of a batch function, from the groups of all prompts: only what it accepts."""
        rollouts = [r for group in groups for r in group]
        inputs: dict[str, Any] = {
            "prompts": [r.prompt.text for r in rollouts],
            "completions": [_completion(r) for r in rollouts],
            "trainer_state": self.trainer_state,
        }
        if _takes(description, "completion_ids"):
            inputs["completion_ids"] = [list(r.completion.ids) for r in rollouts]
        inputs = {k: v for k, v in inputs.items() if _takes(description, k)}
        repeated = {
            k: [v for v, group in zip(values, groups, strict=True) for _ in group] for k, values in columns.items()
        }
        return {"rows": len(rollouts), "inputs": {**repeated, **inputs}}

    def row_tasks(
        self, index: int, group: Sequence[Rollout], columns: Mapping[str, list[Any]], description: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The tasks of a row verifier, one a row, for the group of prompt number `index`."""
        wanted = [n for n in ("prompt", "completion", "completion_ids", "trainer_state") if _takes(description, n)]
        own_columns = {k: v[index] for k, v in columns.items()}
        tasks = []
        for rollout in group:
            own: dict[str, Any] = {
                "prompt": rollout.prompt.text,
                "completion": rollout.completion.text,
                "trainer_state": self.trainer_state,
            }
            if "completion_ids" in wanted:
                own["completion_ids"] = list(rollout.completion.ids)
            tasks.append({"rows": 1, "inputs": {**own_columns, **{n: own[n] for n in wanted}}})
        return tasks


def _completion(rollout: Rollout) -> Any:
    text = rollout.completion.text
    return text if isinstance(rollout.prompt.text, str) else [{"role": "assistant", "content": text}]


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
