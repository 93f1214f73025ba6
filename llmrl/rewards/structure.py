"""Answers that a machine reads: JSON of a schema, assignments that satisfy clauses, and patches."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from typing import Any

from llmrl.errors import RewardError
from llmrl.rewards.base import Noted, row_verifier
from llmrl.rewards.text import answer_or_all, body

_FENCE = re.compile(r"```[A-Za-z]*[ \t]*\n(.*?)```", re.DOTALL)
MAX_JSON, MAX_LINES, MAX_VARIABLES = 1_000_000, 4_000, 100_000
_NO_CLAUSES = "the clauses must be lists of whole numbers that are not 0, or text in DIMACS' form; given "


def json_in(completion: str) -> Any:
    """The JSON of an answer: in its last fence, else the whole of it. Raises ValueError."""
    text = body(completion)
    fences = _FENCE.findall(text) if len(text) <= MAX_JSON else []
    text = fences[-1] if fences else text
    if len(text) > MAX_JSON:
        raise ValueError("too long")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _schema(schema: Any) -> Any:
    """A validator. Raises RewardError without jsonschema and ValueError for what is no schema."""
    try:
        jsonschema = importlib.import_module("jsonschema")
    except ImportError as error:
        raise RewardError("json_schema needs the package jsonschema: pip install 'llmrl[graders]'") from error
    schema = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(schema, dict | bool):
        raise ValueError(f"a JSON schema is a mapping, given {schema!r}")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"no JSON schema: {error.message}") from error
    return kind(schema)


def _no_schema(schema: Any) -> str | None:
    try:
        _schema(schema)
    except (ValueError, RewardError) as error:
        return str(error)
    return None


@row_verifier(
    check_args=lambda *, schema=None: None if schema is None else _no_schema(schema),
    check_gold=lambda *, json_schema=None, schema=None, **_: None if schema is not None else _no_schema(json_schema),
)
def json_schema(completion: str, json_schema: Any = None, *, schema: Any = None) -> float | None:
    """1.0 when the answer is JSON (bare, or in its last fence) that the schema admits, else 0.0; None for a row without a usable schema.

    The schema: `schema` of the recipe, else the column `json_schema` (a mapping, or its text). References to other files are not read.
    Example: json_schema.score('{"a": 1}', schema={"required": ["a"]}) -> 1.0
    """
    try:
        validator = _schema(json_schema if schema is None else schema)
    except ValueError:
        return None
    try:
        problem = next(validator.iter_errors(json_in(completion)), None)
    except (ValueError, RecursionError) as error:
        return Noted(0.0, f"no JSON: {error}" if isinstance(error, ValueError) else "nested too deeply")
    return 1.0 if problem is None else Noted(0.0, f"{problem.json_path}: {problem.message[:400]}")


def read_clauses(clauses: Any) -> list[list[int]]:
    """A formula in conjunctive normal form: lists of literals, or DIMACS text (each clause ended by 0). Raises ValueError."""
    if isinstance(clauses, str):
        lines = [line for line in clauses.split("\n") if line.strip()[:1] not in ("", "c", "p", "%")]
        numbers = [int(word) for word in " ".join(lines).split()]
        out: list[list[int]] = [[]]
        for number in numbers:
            if number:
                out[-1].append(number)
            else:
                out.append([])
        clauses = out if out[-1] else out[:-1]
    fine = isinstance(clauses, list | tuple) and clauses
    if not fine or not all(isinstance(c, list | tuple) and all(type(n) is int and n for n in c) for c in clauses):
        raise ValueError(f"{_NO_CLAUSES}{str(clauses)[:200]}")
    return [list(c) for c in clauses]


def _no_clauses(*, clauses: Any = None, **_: Any) -> str | None:
    try:
        read_clauses(clauses)
    except ValueError as error:
        return str(error)
    return None


_NAMED = re.compile(r"\b[xX]_?\{?(\d{1,9})\}?\s*(?:=|:|is|->)\s*(true|false|t|f|1|0)\b", re.IGNORECASE)
_LITERAL = re.compile(r"(?<![\w.])-?\d{1,9}(?![\w.])")


@row_verifier(safe=True, check_gold=_no_clauses)
def sat_assignment(completion: str, clauses: Any, *, partial: bool = False) -> float | None:
    """1.0 when the assignment in the answer satisfies all clauses, else 0.0; `partial`: the share that it does. None without clauses.

    The answer: "x1 = true, x2 = false" (the final answer, where one is marked), or literals ("1 -2 3", as solvers print). A variable that
    is not named satisfies nothing, one that is given both values makes it 0. `clauses`: lists of literals, or DIMACS text.
    Example: sat_assignment.score("Answer: 1 -2", [[1, 2], [-2]]) -> 1.0
    """
    try:
        formula = read_clauses(clauses)
    except ValueError:
        return None
    text = body(completion)
    named = _NAMED.findall(answer_or_all(completion)) or _NAMED.findall(text)
    if named:
        literals = {int(n) * (1 if value.lower() in ("true", "t", "1") else -1) for n, value in named}
    else:
        literals = {int(n) for n in _LITERAL.findall(text)} - {0}
    if len(literals) > MAX_VARIABLES or any(-n in literals for n in literals):
        return Noted(0.0, "too many literals, or a variable with both values")
    satisfied = sum(any(n in literals for n in clause) for clause in formula)
    if satisfied == len(formula):
        return 1.0
    return Noted(satisfied / len(formula) if partial else 0.0, f"{satisfied} of {len(formula)} clauses satisfied")


def _changes(patch: str) -> list[str]:
    """The lines that a unified diff names: its files, and what it removes and adds; no context, no positions."""
    lines = (line.rstrip() for line in patch.strip().split("\n"))
    return [line for line in lines if line[:1] in ("+", "-")]


@row_verifier(
    check_gold=lambda *, answer=None, **_: (
        None
        if isinstance(answer, str) and _changes(answer)
        else "the reference is no unified diff: no line begins with + or -"
    )
)
def diff_similarity(completion: str, answer: str, *, malformed: float = -1.0) -> float | None:
    """How alike the changed lines of two unified diffs are, from 0 to 1 (difflib's ratio); `malformed` for an answer without a diff
    (SWE-RL, arXiv 2502.18449, section 2.2). None for a row without a reference.

    The diff is in the answer's last fence, else the whole answer.
    """
    wanted = _changes(answer) if isinstance(answer, str) else []
    if not wanted:
        return None
    text = body(completion)
    fences = _FENCE.findall(text)
    given = _changes(fences[-1] if fences else text)
    if not given or len(given) > MAX_LINES:
        return malformed
    return difflib.SequenceMatcher(None, wanted, given, autojunk=False).ratio()
