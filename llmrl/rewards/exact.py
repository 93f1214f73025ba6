"""Exact match of the final answer: cheap, and safe to run in the training process."""

from __future__ import annotations

from typing import Any

from llmrl.errors import DataError
from llmrl.rewards.answer import final_answer, gold_answer, number_with_unit, same_text
from llmrl.rewards.base import row_verifier, wrong


def check_gold(*, column: str | None = None, **columns: Any) -> str | None:
    """Why the row has no usable reference answer, or None."""
    try:
        gold_answer(columns, column)
    except DataError as error:
        return str(error)
    return None


def read_answer(completion: str, *, column: str | None = None, **columns: Any) -> str | None:
    """The final answer of a completion as `exact_match` reads it, or None."""
    try:
        numeric = number_with_unit(gold_answer(columns, column)) is not None
    except DataError:
        numeric = False
    return final_answer(completion, numeric=numeric)


@row_verifier(safe=True, check_gold=check_gold, read_answer=read_answer)
def exact_match(completion: str, *, column: str | None = None, **columns: Any) -> float | None:
    r"""1.0 when the final answer equals the reference, else 0.0; None when the row has no reference.

    Numbers are compared by value ("1,000" = 1000, "073" = 73, "27.0" = 27), everything else as text. The final answer is the last
    `\boxed{}`, `<answer></answer>`, or what follows "Answer:"; for a numeric reference also the last number.
    `column`: where the reference is; default `answer`, else `solution`.

    Example: exact_match.score("so 12 + 7 = 19", answer="19") -> 1.0
    """
    try:
        gold = gold_answer(columns, column)
    except DataError:
        return None
    number = number_with_unit(gold)
    answer = read_answer(completion, column=column, **columns)
    if answer is None:
        return wrong(None, gold)
    same = same_text(answer, gold) if number is None else number_with_unit(answer) == number
    return 1.0 if same else wrong(answer, gold)
