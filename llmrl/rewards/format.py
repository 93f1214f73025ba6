"""Rewards for the form of a completion. All are linear in its length and run in the training process."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmrl.rewards.base import Noted, row_verifier
from llmrl.rewards.text import body


@row_verifier(safe=True)
def think_format(completion: str) -> float:
    """1.0 for "<think>...</think>...": the completion opens with the only <think>, which is closed (TRL's `think_format_reward`)."""
    good = completion.startswith("<think>") and completion.count("<think>") == 1 and "</think>" in completion
    return float(good)


@row_verifier(safe=True)
def think_answer_format(completion: str) -> float:
    r"""1.0 for "<think>\n...\n</think>\n<answer>\n...\n</answer>" and nothing around it (open-r1's `format`)."""
    if not completion.startswith("<think>\n") or not completion.endswith("\n</answer>"):
        return 0.0
    middle = re.search(r"\n</think>\n<answer>\n", completion)
    return float(
        middle is not None and middle.end() <= len(completion) - len("\n</answer>") and middle.start() >= len("<think>")
    )


@row_verifier(safe=True)
def tag_count(completion: str) -> float:
    r"""0.25 for each of "<think>\n", "\n</think>\n", "\n<answer>\n" and "\n</answer>" that occurs exactly once (open-r1's `tag_count`)."""
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return sum(0.25 for tag in tags if completion.count(tag) == 1)


_CODE = re.compile(r"^```[ \t]*([A-Za-z+#]*)[^\n]*\n", re.MULTILINE)


@row_verifier(safe=True)
def code_format(completion: str, *, language: str = "python") -> float:
    r"""1.0 when the answer (what is behind "</think>", in "<answer>" where there is one) has a closed fence of that language."""
    answer = body(completion)
    for fence in _CODE.finditer(answer):
        if fence.group(1).lower() == language.lower():
            return float(answer.find("\n```", fence.end() - 1) >= 0)
    return 0.0


def _check_sections(*, names: Sequence[str], ordered: bool = True) -> str | None:
    fine = not isinstance(names, str) and names and all(isinstance(n, str) and n.strip() for n in names)
    return None if fine else f"names must be a list of headings, given {names!r}"


@row_verifier(safe=True, check_args=_check_sections)
def sections(completion: str, *, names: Sequence[str], ordered: bool = True) -> float:
    r"""The share of the named sections that are there once, with text in them; `ordered`: 0.0 if those are in another order.

    A heading is a line with the name, in any case, perhaps behind `#`, in `**` and before a colon; or with the colon and text behind it.
    Example: sections.score("# Plan\nthink\n# Answer\n4", names=["Plan", "Answer"]) -> 1.0
    """
    wanted = {name.strip().lower(): place for place, name in enumerate(names)}
    found: list[tuple[int, bool]] = []  # which section begins, and whether it has text
    for line in completion.split("\n"):
        head, colon, rest = line.strip().partition(":")
        place = wanted.get(head.strip("#* \t").lower()) if len(head) <= 400 else None
        if place is not None and (colon or not rest):
            found.append((place, bool(rest.strip("* \t"))))
        elif found and line.strip():
            found[-1] = (found[-1][0], True)
    places = [place for place, _ in found]
    good = (
        [place for place, text in found if text and places.count(place) == 1] if len(places) <= 4 * len(wanted) else []
    )
    missing = [name for name, place in wanted.items() if place not in good]
    if missing or (ordered and good != sorted(good)):
        score = 0.0 if ordered and good != sorted(good) else len(good) / len(wanted)
        return Noted(score, f"not once with text: {', '.join(missing)}" if missing else "in another order")
    return 1.0
