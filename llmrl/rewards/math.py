r"""The math verifier: does the final answer equal the reference, as mathematics?

Comparison is math-verify's. Its own time limits (signals, which fail outside the main thread) are off: the runner kills a worker
that is late. Numbers too large to be an answer are refused before sympy would try to compute them.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from llmrl.errors import DataError
from llmrl.rewards.answer import final_answer, gold_answer, number_with_unit, same_text
from llmrl.rewards.base import row_verifier

# An answer may be this much longer than its reference; longer ones are no final answers, and slow to parse.
EXTRA_CHARACTERS = 500


def check_gold(*, column: str | None = None, **columns: Any) -> str | None:
    """Why the row's reference answer can't be verified against, or None."""
    try:
        gold = gold_answer(columns, column)
    except DataError as error:
        return str(error)
    if number_with_unit(gold) is not None:
        return None
    parsed = _parse_gold(gold)
    if not parsed:
        return f"math-verify can't parse the reference answer {gold[:80]!r}"
    return (
        None if _equal(parsed, parsed) else f"the reference answer {gold[:80]!r} does not equal itself for math-verify"
    )


def _warm_up() -> None:
    _parse(r"\frac{1}{2}")


@row_verifier(check_gold=check_gold, warm_up=_warm_up)
def math_answer(completion: str, *, column: str | None = None, **columns: Any) -> float | None:
    r"""1.0 when the final answer equals the reference as mathematics, else 0.0; None when the row has no usable reference.

    The final answer is the last closed `\boxed{}`, `<answer></answer>`, or what follows "Answer:" or "####"; for a numeric reference
    also the last number of the text. `column`: where the reference is; default `answer`, else `solution`, of which the last
    `\boxed{}` or what follows "####" counts.

    Example: math_answer.score(r"so \boxed{\frac{2}{4}}", answer="0.5") -> 1.0
    """
    try:
        gold = gold_answer(columns, column)
    except DataError:
        return None
    number = number_with_unit(gold)
    answer = final_answer(completion, numeric=number is not None)
    if answer is None:
        return 0.0
    if same_text(answer, gold):
        return 1.0
    if number is not None and (value := number_with_unit(answer)) is not None:
        return float(value == number)
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        return None
    if len(answer) > len(gold) + EXTRA_CHARACTERS:
        return 0.0
    return float(verify_parsed(parsed_gold, answer))


def verify_parsed(gold: list[Any], answer: str) -> bool:
    """Whether `answer` equals the parsed reference. Raises MemoryError; every other failure to compare means that it does not."""
    from llmrl.rewards.math_guard import too_large_expression, too_large_text

    if too_large_text(answer):
        return False
    parsed = _parse(answer)
    if not parsed or too_large_expression(parsed[0]):
        return False
    return _equal(gold, parsed)


@functools.lru_cache(maxsize=1 << 16)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(gold)


def _parse(answer: str) -> list[Any]:
    """[expression, normalised text], or [text], or []: what math-verify makes of an answer that has been extracted already."""
    from math_verify import LatexExtractionConfig, parse

    _quiet()
    answer = re.sub(r"(?<=\d),?\\[!,](?=\d{3})|^\\approx", "", answer)
    # math-verify takes a letter after a space for a unit: of "a + b + c" it would keep "a +".
    answer = re.sub(r"(?<=[-+=*/^]) +| +(?=[-+=*/^])", "", answer)
    found = parse(f"\\boxed{{{answer}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
    # Only text came back: the answer could not be read as LaTeX. Comparing texts has been done before, more leniently.
    return found if found and not isinstance(found[0], str) else []


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    try:
        return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception as error:
        # Comparing a matrix with an inequality, say: math-verify raises, and the two are not equal.
        logging.getLogger("llmrl.rewards").debug("not comparable: %s", error)
        return False


@functools.cache
def _quiet() -> None:
    # math-verify warns that its limits are off. They are meant to be.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
