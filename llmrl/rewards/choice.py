"""Multiple choice: the letter that a completion chooses. Linear, run in the trainer."""

from __future__ import annotations

import re
from typing import Any

from llmrl.rewards.answer import final_answer
from llmrl.rewards.base import row_verifier, wrong
from llmrl.rewards.text import body, normalized, spoken


@row_verifier(
    safe=True,
    read_answer=lambda completion, *, choices=None, **_: chosen_letter(completion, choices),
    check_gold=lambda *, answer=None, choices=None, **_: (
        None
        if _letter(answer, choices) is not None
        else f"the reference {answer!r} is no choice: it must be a letter, its number from 1, or the text of one of `choices`"
    ),
)
def multiple_choice(completion: str, answer: Any, choices: Any = None) -> float | None:
    """1.0 when the chosen letter is the reference's, else 0.0; None without a usable reference.

    The choice is the letter of the final answer: "(B)", "B.", "B: text", "option B", or the text of one of the row's `choices`; where no
    final answer is marked, the last "answer is B" or a lone last line. `answer`: a letter or the text of a choice; labels 1-5 are A-E.

    Example: multiple_choice.score("so the answer is (B).", "B") -> 1.0
    """
    gold = _letter(answer, choices)
    if gold is None:
        return None
    chosen = chosen_letter(completion, choices)
    return 1.0 if chosen == gold else wrong(chosen, gold)


_CHOICE = re.compile(
    r"[\s*$]*(?:\\(?:text|textbf|mathrm|mathbf|mbox)\{)?(?:(?:option|choice|answer)\s+)?[\s(\[*$]*([A-Za-z1-9])(?:[)\].:,*$}]|\s*$|\s+[-–]\s)",
    re.I,
)
_SAID = re.compile(r"(?:answer|choice|option)(?:\s+is)?\s*:?[\s(\[*$]*([A-J])(?![\w'’])", re.I)


def chosen_letter(completion: str, choices: Any = None) -> str | None:
    """The letter (A, B, ...) that a completion chooses, or None."""
    found = final_answer(spoken(completion), numeric=False)
    if found is not None:
        return _letter(found, choices)
    rest = body(completion)
    said = None
    for said in _SAID.finditer(rest):  # noqa: B007  (the last)
        pass
    if said is not None:
        return said.group(1).upper()
    lines = [line for line in rest.split("\n") if line.strip()]
    return _letter(lines[-1], choices) if lines else None


def _texts(choices: Any) -> list[str]:
    """The choices' texts: a list, a list of {"label", "text"}, or ARC's {"text": [...], "label": [...]}."""
    texts = choices.get("text") if isinstance(choices, dict) else choices
    if isinstance(texts, list | tuple) and all(isinstance(t, dict) for t in texts):
        texts = [t.get("text") for t in texts]
    return [str(t) for t in texts] if isinstance(texts, list | tuple) else []


def _letter(value: Any, choices: Any) -> str | None:
    if value is None:
        return None
    text, texts = str(value).strip()[:2000], _texts(choices)
    if (lone := re.fullmatch(r"[(\s]*([A-Z])[).:\s]*", text)) and ord(lone[1]) - ord("A") < (len(texts) or 10):
        return lone[1]  # a letter is a label, also where a choice's text is a letter ("C" for carbon)
    words = normalized(text)
    exact = [place for place, choice in enumerate(texts) if choice.strip() == text]  # first: "Rr" is not "rr"
    same = [place for place, choice in enumerate(texts) if words and words == normalized(choice)]
    if exact or same:
        return chr(ord("A") + (exact or same)[0])
    if (match := _CHOICE.match(text)) is None:
        return None
    letter = match.group(1).upper()
    letter = chr(ord("A") + int(letter) - 1) if letter.isdigit() else letter
    return letter if ord(letter) - ord("A") < (len(texts) or 10) else None
