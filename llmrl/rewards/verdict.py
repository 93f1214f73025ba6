"""Reads a judge's reply. Strict about what a verdict is; lenient only about what may stand around it."""

from __future__ import annotations

import json
from typing import Any

from llmrl.config.rubric import Criterion, Rubric

_OBJECTS, _CHARACTERS, _REASONS = 64, 200_000, 1000


class VerdictError(ValueError):
    """A reply that can't be used; the text tells the judge why. `scores` are those of its criteria that can be."""

    def __init__(self, message: str, scores: dict[str, float] | None = None) -> None:
        super().__init__(message)
        self.scores = scores


def read_scores(reply: str, rubric: Rubric, verdict_id: str) -> dict[str, float]:
    """criterion -> score, for exactly the rubric's criteria. Raises VerdictError.

    Example: read_scores('{"id": "x1", "scores": {"correct": 1}}', rubric, "x1") -> {"correct": 1.0}
    """
    given = _verdict(reply, verdict_id).get("scores")
    if not isinstance(given, dict):
        raise VerdictError("`scores` must be an object with a number for each criterion")
    criteria = {c.name: c for c in rubric.criteria}
    problems = [f"there is no criterion {name!r}" for name in given if name not in criteria]
    good: dict[str, float] = {}
    for name, criterion in criteria.items():
        problem = _problem(given.get(name), criterion) if name in given else f"the score of {name!r} is missing"
        if problem is None:
            good[name] = float(given[name])
        else:
            problems.append(problem)
    if problems:
        raise VerdictError("; ".join(problems[:10]), good)
    return good


def read_winner(reply: str, verdict_id: str) -> str:
    """ "first", "second" or "tie". Raises VerdictError."""
    winner = _verdict(reply, verdict_id).get("winner")
    if winner not in ("first", "second", "tie"):
        raise VerdictError('`winner` must be "first", "second" or "tie"')
    return str(winner)


def read_reasons(reply: str, verdict_id: str) -> str:
    """What the verdict gives as its reasons, on one line: of a comparison's, or a criterion each; "" without any. Raises VerdictError.

    Example: read_reasons('{"id": "x1", "reasons": {"correct": "it is 4"}, "scores": {...}}', "x1") -> "correct: it is 4"
    """
    verdict = _verdict(reply, verdict_id)
    given = verdict.get("reasons", verdict.get("reason"))
    texts = [f"{name}: {text}" for name, text in given.items()] if isinstance(given, dict) else [given] if given else []
    return " ".join(" ".join(map(str, texts)).split())[:_REASONS]


def _problem(score: Any, criterion: Criterion) -> str | None:
    low, high = criterion.range
    if isinstance(score, bool) or not isinstance(score, int | float):
        return f"the score of {criterion.name!r} is no number"
    if not low <= score <= high:
        return f"the score of {criterion.name!r} is not between {low:g} and {high:g}"
    if criterion.whole and score != int(score):
        return f"the score of {criterion.name!r} is no whole number"
    return None


def _verdict(reply: str, verdict_id: str) -> dict[str, Any]:
    """The object with the right id. Text around it (fences, a preamble, thoughts in front) is dropped; two that differ are refused."""
    text = reply.rpartition("</think>")[2][-_CHARACTERS:]
    objects = _objects(text)
    own = [o for o in objects if o.get("id") == verdict_id]
    if any(o != own[0] for o in own):
        raise VerdictError("the reply holds two verdicts that differ; give one")
    if own:
        return own[0]
    if objects:
        raise VerdictError("the JSON object in the reply does not have the right `id`")
    raise VerdictError("the reply holds no complete JSON object" + (", or it was cut off" if "{" in text else ""))


def _objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, none inside another."""
    found: list[dict[str, Any]] = []
    decoder = json.JSONDecoder(object_pairs_hook=_without_doubles, parse_constant=_refuse)
    at = text.find("{")
    for _ in range(_OBJECTS):
        if at < 0:
            break
        try:
            value, end = decoder.raw_decode(text, at)
            found.append(value)
        except (ValueError, RecursionError):
            end = at + 1
        at = text.find("{", end)
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
