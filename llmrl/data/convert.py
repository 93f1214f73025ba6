"""Rows of published data sets -> the one form that data scripts write and benchmarks read.

The form: `{id, source, messages, answer, verifier, meta}`. `messages` ends with the user's turn that holds the bare problem, without
instructions on the format; `answer` is a non-empty string (for code and instructions the empty string: what decides is in `meta`);
`verifier` names the built-in reward that judges; `meta` holds every other column that the verifier or a breakdown needs.
A row that has this form already passes through every converter unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmrl.errors import DataError

Record = dict[str, Any]
Converter = Callable[[Mapping[str, Any], int], Record]
FIELDS = ("id", "source", "messages", "answer", "verifier", "meta")


def is_record(row: Mapping[str, Any]) -> bool:
    """Whether the row has the form already."""
    return all(name in row for name in FIELDS)


def record(
    id: str, source: str, question: str, answer: str, verifier: str, meta: Mapping[str, Any] | None = None
) -> Record:
    """A row of the form; columns of `meta` that are None are left out. Raises DataError for an empty question or id."""
    if not str(id).strip() or not question.strip():
        raise DataError(f"{source} row {id!r}: no id or no question")
    kept = {key: value for key, value in (meta or {}).items() if value is not None}
    return {"id": str(id), "source": source, "messages": [{"role": "user", "content": question}], "answer": answer,
            "verifier": verifier, "meta": kept}  # fmt: skip


def math500(row: Mapping[str, Any], index: int) -> Record:
    """HuggingFaceH4/MATH-500: problem, solution, answer, subject, level, unique_id."""
    name = row["id"] if "id" in row else f"math500/{row['unique_id']}"
    meta = {key: row.get(key) for key in ("subject", "level", "solution")}
    return record(name, "MATH-500", row["problem"], answer_of(row, name), "math_answer", meta)


def answer_of(row: Mapping[str, Any], name: str, column: str = "answer") -> str:
    """The reference answer as text. Raises DataError when it is empty."""
    answer = row.get(column)
    if answer is None or not str(answer).strip():
        raise DataError(f"{name}: the column {column!r} is empty, so no completion could be judged")
    return str(answer)


CONVERTERS: dict[str, Converter] = {"math500": math500}
