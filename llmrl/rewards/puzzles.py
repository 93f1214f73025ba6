"""Logic puzzles whose answer is an assignment. Linear, run in the trainer."""

from __future__ import annotations

import re
from typing import Any

from llmrl.rewards.base import Noted, row_verifier
from llmrl.rewards.text import answer_or_all, body, spoken

_KIND = re.compile(
    r"\b([^\W\d_][\w'-]{0,40})\s{0,9}(?:is|=|:|->|→)\s{0,9}(?:an?\s+|the\s+)?(knight|knave)\b", re.IGNORECASE
)


def read_kinds(text: str) -> dict[str, set[str]]:
    """name in small letters -> what the text calls it ("knight", "knave"); both where it contradicts itself.

    Example: read_kinds("Ann is a knight, Bob: knave") -> {"ann": {"knight"}, "bob": {"knave"}}
    """
    found: dict[str, set[str]] = {}
    for name, kind in _KIND.findall(text.replace("*", "")):
        found.setdefault(name.lower(), set()).add(kind.lower())
    return found


def _gold(answer: Any) -> dict[str, set[str]]:
    return read_kinds(answer) if isinstance(answer, str) else {}


@row_verifier(
    safe=True,
    read_answer=lambda completion, **_: _conclusion(completion) or None,
    check_gold=lambda *, answer=None, **_: (
        None
        if _gold(answer) and all(len(kinds) == 1 for kinds in _gold(answer).values())
        else f"the reference {answer!r} does not say of each person 'NAME is a knight' or 'NAME is a knave'"
    ),
)
def knights_and_knaves(completion: str, answer: Any) -> float | None:
    """1.0 when the answer calls every person of the reference what the reference does, and nobody both; else 0.0. None without a reference.

    The answer: the final answer, else the last paragraph; "Ann is a knight", "Ann: knight" and "Ann = knight" are read.
    Example: knights_and_knaves.score("So Bob is a knave and Ann is a knight.", "Ann is a knight, Bob is a knave") -> 1.0
    """
    gold = _gold(answer)
    if not gold:
        return None
    given = read_kinds(_conclusion(completion))
    wrong = [name for name, kinds in gold.items() if given.get(name) != kinds]
    return Noted(0.0, f"wrong or missing: {', '.join(wrong)}") if wrong else 1.0


def _conclusion(completion: str) -> str:
    """The final answer where it names persons, else the last paragraph that does."""
    marked = answer_or_all(completion)
    if marked != body(completion) and read_kinds(marked):
        return marked
    paragraphs = [p for p in re.split(r"\n\s*\n", spoken(completion)) if read_kinds(p)]
    return paragraphs[-1] if paragraphs else ""
