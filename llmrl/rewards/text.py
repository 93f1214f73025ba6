"""Rewards that compare an answer with a reference text: equality, tokens in common, sets, and keywords. Linear, run in the trainer.

What is compared is the final answer (the last `\\boxed{}`, `<answer></answer>`, or what follows "Answer:"), else the whole completion.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llmrl.rewards.answer import final_answer
from llmrl.rewards.base import Noted, row_verifier, wrong

_ARTICLES = frozenset(("a", "an", "the"))


def spoken(completion: str) -> str:
    """What is behind "</think>"; nothing where a thinking was not closed."""
    _, closed, rest = completion.rpartition("</think>")
    return rest if closed or not completion.lstrip().startswith("<think>") else ""


def body(completion: str) -> str:
    """What is behind "</think>", and of that what is in the last "<answer></answer>"."""
    rest = spoken(completion)
    _, opened, inner = rest.rpartition("<answer>")
    return inner.partition("</answer>")[0] if opened else rest


def answer_or_all(completion: str) -> str:
    """The final answer as text, else the `body`."""
    found = final_answer(spoken(completion), numeric=False)
    return body(completion) if found is None else found


def normalized(text: str) -> list[str]:
    """The words of a text in small letters, without punctuation and English articles, as for SQuAD (arXiv 1606.05250, section 6.1)."""
    kept = "".join(
        c for c in unicodedata.normalize("NFKC", text).lower() if not unicodedata.category(c).startswith("P")
    )
    words = kept.split()
    return [word for word in words if word not in _ARTICLES] or words  # "A" may be the answer


def _references(answer: Any) -> list[str]:
    return [str(a) for a in (answer if isinstance(answer, list | tuple) else [answer]) if a is not None]


def _no_reference(*, answer: Any = None, **_: Any) -> str | None:
    return None if any(map(normalized, _references(answer))) else f"there is no text in the reference {answer!r}"


@row_verifier(safe=True, check_gold=_no_reference)
def text_match(completion: str, answer: Any, *, within: bool = False) -> float | None:
    """1.0 when the answer has the same words as the reference (or as one of several), else 0.0; `within`: when it contains them in a
    row. None without a reference.

    Example: text_match.score("Answer: the Nile.", "Nile") -> 1.0
    """
    references = [words for r in _references(answer) if (words := normalized(r))]
    if not references:
        return None
    words = normalized(answer_or_all(completion))
    text = f" {' '.join(words)} "
    same = any(f" {' '.join(r)} " in text for r in references) if within else words in references
    return 1.0 if same else wrong(" ".join(words[:80]) or None, " / ".join(" ".join(r) for r in references[:5]))


@row_verifier(safe=True, check_gold=_no_reference)
def text_f1(completion: str, answer: Any) -> float | None:
    """F1 of the words in common with the reference, the best over several (SQuAD's). None without a reference.

    Example: text_f1.score("the Nile in Egypt", "river Nile") -> 0.4
    """
    references = [words for r in _references(answer) if (words := normalized(r))]
    if not references:
        return None
    words = normalized(answer_or_all(completion))
    common = [sum((Counter(words) & Counter(r)).values()) for r in references]
    return max(2 * c / (len(words) + len(r)) for c, r in zip(common, references, strict=True))


def _items(value: Any, separator: str) -> set[str]:
    parts = value if isinstance(value, list | tuple) else str(value).strip().strip("{}[]()").split(separator)
    return {" ".join(normalized(str(p))) for p in parts} - {""}


def _check_set(*, beta: float = 1.0, separator: str = ",") -> str | None:
    return (
        None if beta > 0 and separator else f"beta must be above 0 and separator a text, given {beta} and {separator!r}"
    )


@row_verifier(
    safe=True,
    check_args=_check_set,
    check_gold=lambda *, answer=None, separator=",", **_: (
        None if _items([] if answer is None else answer, separator) else f"there is no item in the reference {answer!r}"
    ),
)
def set_fbeta(completion: str, answer: Any, *, beta: float = 1.0, separator: str = ",") -> float | None:
    """F-beta of the set of answered items against the reference's, in any order; beta above 1 favours recall. None without a reference.

    Example: set_fbeta.score("Answer: b, c, x", ["a", "b", "c"]) -> 2/3
    """
    wanted = _items([] if answer is None else answer, separator)
    if not wanted:
        return None
    given = _items(answer_or_all(completion), separator)
    both = len(given & wanted)
    score = (1 + beta**2) * both / (beta**2 * len(wanted) + len(given))
    return score if score == 1.0 else Noted(score, f"{both} of {len(wanted)} found, {len(given) - both} too many")


def _check_keywords(*, keywords: Sequence[str], most: int | None = None, whole_words: bool = True) -> str | None:
    fine = not isinstance(keywords, str) and keywords and all(isinstance(k, str) and k.strip() for k in keywords)
    return None if fine and (most is None or most >= 1) else "keywords must be a list of texts, and most at least 1"


@row_verifier(safe=True, check_args=_check_keywords)
def keyword_count(
    completion: str, *, keywords: Sequence[str], most: int | None = None, whole_words: bool = True
) -> float:
    """The share of the keywords that occur, in any case; with `most`, all their occurrences up to that number, as a share of it.

    Example: keyword_count.score("First this, then that", keywords=["first", "then", "finally", "so"]) -> 0.5
    """
    text = completion.lower()
    edge = (r"(?<!\w)", r"(?!\w)") if whole_words else ("", "")
    counts = [len(re.findall(edge[0] + re.escape(k.lower()) + edge[1], text)) for k in keywords]
    return sum(map(bool, counts)) / len(counts) if most is None else min(sum(counts), most) / most


_STEP = re.compile(
    r"^[*]{0,2}(?:step \d+|\d{1,3}[.)]|[-*•])(?=\s|:)|^(?:first|second|third|next|then|finally)(?:ly)?,", re.I
)


@row_verifier(safe=True)
def reasoning_steps(completion: str, *, wanted: int = 3) -> float:
    """The number of lines that begin like a step ("Step 1:", "2.", "-", "First,"), as a share of `wanted`, at most 1.

    Example: reasoning_steps.score("Step 1: add\\nStep 2: divide") -> 2/3
    """
    steps = sum(
        _STEP.match(line.lstrip(" \\t#*")) is not None or line.lstrip()[:2] == "* " for line in completion.split("\n")
    )
    return min(1.0, steps / max(1, wanted))
