"""Rows of the form that the data scripts write, and open-instruct's, as the columns that trainers and reward functions read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrl.data.convert import FIELDS, is_record
from llmrl.errors import DataError

TAKEN = frozenset((*FIELDS, "prompt", "question", "completion", "completion_ids"))
OPEN_INSTRUCT = ("messages", "ground_truth", "dataset")


def unfold(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of a row; one of neither form is returned as it is.

    A record (`llmrl.data.convert`) gives `id`, `source`, `answer`, `verifier` and each key of `meta`; its messages are the `prompt` where
    they end with a user's turn, whose text is also there as `question`, for templates; else they are `messages` to learn from. The
    choices of a `multiple_choice` record are put behind its problem, lettered, one a line: without them it could not be answered.
    open-instruct's rows (`messages`, `ground_truth`, `dataset`) get `prompt` (without a final assistant's turn), `answer` and `verifier`.
    Raises DataError for a key of `meta` that is a column already, and for what can't be read.
    """
    if is_record(values):
        return _record(values)
    if all(values.get(name) is not None for name in OPEN_INSTRUCT) and "prompt" not in values:
        return _open_instruct(values)
    return values


def _record(values: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = values["meta"] or {}
    if not isinstance(meta, Mapping):
        raise DataError(f"`meta` must be an object of further columns, got {type(meta).__name__}")
    meta = {name: value for name, value in meta.items() if value is not None}  # Parquet gives every row every key
    double = sorted((TAKEN | values.keys()) & meta.keys())
    if double:
        raise DataError(
            f"`meta` has the key {', '.join(map(repr, double))}, which is a column of its own already; rename it in `meta`"
        )
    columns = {name: value for name, value in values.items() if name not in ("messages", "meta")}
    messages = values["messages"]
    if _speaker(messages) == "assistant":
        return {**columns, **meta, "messages": messages}
    if _speaker(messages) != "user":
        return {**columns, **meta, "prompt": messages}  # the reader of prompts says what is wrong with them
    question = messages[-1].get("content")
    if values["verifier"] == "multiple_choice" and meta.get("choices"):
        lettered = "\n".join(f"{choice['label']}. {choice['text']}" for choice in meta["choices"])
        question = f"{question}\n\n{lettered}"
        messages = [*messages[:-1], {**messages[-1], "content": question}]
    return {**columns, **meta, "prompt": messages, "question": question}


def _open_instruct(values: Mapping[str, Any]) -> Mapping[str, Any]:
    answer, verifier, messages = values["ground_truth"], values["dataset"], values["messages"]
    if isinstance(verifier, list):
        if len(verifier) != 1 or (isinstance(answer, list) and len(answer) != 1):
            raise DataError(
                f"`dataset` names {len(verifier)} verifiers ({verifier!r}); a row is judged by one: make a row of each"
            )
        verifier, answer = verifier[0], answer[0] if isinstance(answer, list) else answer
    prompt = messages[:-1] if _speaker(messages) == "assistant" else messages
    return {**values, "prompt": prompt, "answer": answer, "verifier": verifier}


def _speaker(messages: Any) -> Any:
    """Who has the last turn; None where there is none."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return last.get("role") if isinstance(last, Mapping) else None
