"""Instruction following by rules: the verifiable instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from typing import Any

from llmrl.errors import DataError
from llmrl.rewards.base import Noted, literal, row_verifier
from llmrl.rewards.ifeval_checks import CHECKS, USE_LANGUAGES, names_of, problem_with
from llmrl.rewards.ifeval_text import NEEDS_LANGDETECT, language_of

Instruction = tuple[str, dict[str, Any]]


def read_instructions(ids: Any, kwargs: Any, ground_truth: Any = None) -> list[Instruction]:
    """A row's instructions with the keyword arguments that each takes. Columns may be JSON; None in `kwargs` means absent.

    ground_truth: where there are no ids: [{"instruction_id": ids, "kwargs": kwargs}], or the text of that, as JSON or Python writes it.
    Raises DataError for what can't be checked.
    """
    if ids is None and ground_truth is not None:
        ids, kwargs = _unpacked(ground_truth)
    try:
        ids = json.loads(ids) if isinstance(ids, str) else ids
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    except ValueError as error:
        raise DataError(f"instruction_id_list or kwargs is text that is no JSON: {error}") from error
    if not isinstance(ids, list | tuple) or not ids:
        raise DataError(f"instruction_id_list must be a list of instructions (or ground_truth hold one), given {ids!r}")
    kwargs = [{}] * len(ids) if kwargs is None else kwargs
    if not isinstance(kwargs, list | tuple) or len(kwargs) != len(ids):
        raise DataError(
            f"kwargs must be a list with one item for each of the {len(ids)} instructions, given {kwargs!r}"
        )
    return [_instruction(name, given) for name, given in zip(ids, kwargs, strict=True)]


def _unpacked(ground_truth: Any) -> tuple[Any, Any]:
    """ids and kwargs of open-instruct's column."""
    found = ground_truth
    for _ in range(3):  # a text, a list of one, a text in it
        found = literal(found)
        if isinstance(found, list | tuple) and len(found) == 1:
            found = found[0]
    if not isinstance(found, Mapping) or "instruction_id" not in found:
        raise DataError(
            f'ground_truth must be a list with one {{"instruction_id": [...], "kwargs": [...]}}, given {str(ground_truth)[:200]}'
        )
    return found["instruction_id"], found.get("kwargs")


def _instruction(name: Any, given: Any) -> Instruction:
    if name not in CHECKS:
        raise DataError(f"unknown instruction {name!r}; known are {', '.join(CHECKS)}")
    if given is not None and not isinstance(given, Mapping):
        raise DataError(f"{name}: its kwargs must be a mapping, given {given!r}")
    known = {k: v for k, v in (given or {}).items() if v is not None}
    wanted = names_of(name)
    missing = [k for k in wanted if k not in known]
    if missing:
        raise DataError(f"{name}: kwargs has no {', '.join(missing)}")
    problems = [p for k in wanted if (p := problem_with(k, known[k]))]
    taken = {k: int(known[k]) if isinstance(known[k], float) else known[k] for k in wanted if not problems}
    if not problems and taken.get("nth_paragraph", 0) > taken.get("num_paragraphs", float("inf")):
        problems = [f"paragraph {taken['nth_paragraph']} of {taken['num_paragraphs']} is asked for"]
    if problems:
        raise DataError(f"{name}: {problems[0]}")
    return name, taken


def variants(text: str) -> list[str]:
    """The response, and the seven others that count in the loose mode: without its first line, its last, both, and asterisks."""
    lines = text.split("\n")
    cut = [text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return [*cut, *(t.replace("*", "") for t in cut)]


def follows(text: str, instruction: Instruction, *, loose: bool = False) -> bool:
    """Whether a response (in the loose mode: one of its variants) follows an instruction. An empty one follows none."""
    name, kwargs = instruction
    check: Callable[..., bool] = CHECKS[name]
    return any(check(t, **kwargs) for t in dict.fromkeys(variants(text) if loose else [text]) if t.strip())


def check_gold(
    *, instruction_id_list: Any = None, kwargs: Any = None, ground_truth: Any = None, **_: Any
) -> str | None:
    """Why a row's instructions can't be checked, or None."""
    try:
        found = read_instructions(instruction_id_list, kwargs, ground_truth)
    except DataError as error:
        return str(error)
    if any(name in USE_LANGUAGES for name, _ in found) and importlib.util.find_spec("langdetect") is None:
        return NEEDS_LANGDETECT
    return None


def _warm_up() -> None:
    if importlib.util.find_spec("langdetect") is not None:
        language_of("reads the profiles of all languages")


@row_verifier(check_gold=check_gold, warm_up=_warm_up)
def instructions(
    completion: str, instruction_id_list: Any = None, kwargs: Any = None, ground_truth: Any = None, *,
    loose: bool = False, partial: bool = False,
) -> float | None:  # fmt: skip
    """1.0 when the response follows all of the row's instructions, else 0.0; `partial`: the share that it follows.

    instruction_id_list and kwargs: columns as in IFEval (a name and a mapping for each instruction); ground_truth: both in one column, as
    open-instruct's datasets have them. `loose`: an instruction is also followed if it is without the first or last line, or without
    asterisks. What is before "</think>" is no part of the response. None for a row whose instructions can't be checked.

    Example: instructions.score("no commas here", ["punctuation:no_comma"], [{}]) -> 1.0
    """
    try:
        asked = read_instructions(instruction_id_list, kwargs, ground_truth)
    except DataError:
        return None
    closed = completion.rfind("</think>")
    text = completion[closed + len("</think>") :].strip() if closed >= 0 else completion
    if closed < 0 and text.lstrip().startswith("<think>"):
        text = ""  # it never began to answer
    followed = [follows(text, instruction, loose=loose) for instruction in asked]
    if all(followed):
        return 1.0
    missed = [name for (name, _), fine in zip(asked, followed, strict=True) if not fine]
    return Noted(sum(followed) / len(followed) if partial else 0.0, f"not followed: {', '.join(missed)}")
