"""The final answer in a text, and plain numbers. Linear in the length of the text, whatever is in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from llmrl.errors import DataError
from llmrl.functional.boxed import BOX, braced
from llmrl.functional.boxed import last_boxed as last_boxed  # others take it from here

MAX_BOXES = 64
MAX_NUMBER = 400  # characters of what is read as a plain number
_NUMBER = re.compile(r"[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][-+]?\d{1,3})?")
_NUMBER_FIRST = re.compile(r"[-+]?\s*[$€£]?\s*(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?")
_IN_TEXT = re.compile(r"(?<![\w.,])[-+−]?\$?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)?(?:\.\d+)?(?=$|\D)")
_BETWEEN_BOXES = re.compile(r"(?:[\s,;$.]|\\[()\[\],; ]|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\}|\\q?quad)*")
_BETWEEN_GOLD_BOXES = re.compile(r"(?:(?!\bnot?\b)[^.!?\n]){0,40}")
_MARKER = re.compile(r"(?:(?:(?:final )?answer|\bans)(?: is)?[*_]*[:：][*_]*|answer is[*_]*|####)", re.IGNORECASE)
# A word after a number that makes it another number: such an answer is not "a number and its unit".
_NOT_UNITS = re.compile(
    r"\b(?:pi|sqrt|root|log|ln|exp|sin|cos|tan|theta|percent|half|third|quarter|or|and|to|times|plus|minus|over|mod|squared|cubed"
    r"|factorial|more|less|fewer|of|than)\b",
    re.IGNORECASE,
)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(r"[^A-Za-z]*(?:text|mathrm|mbox|textbf)?[^A-Za-z]*(" + "|".join(_SCALES) + r")s?\b", re.IGNORECASE)
_UNIT = re.compile(
    r"(?:\\?\s|~)*(?:\\(?:text|mathrm|mbox|textbf)\{\s*[A-Za-z .°]+\}"
    r"|(?<=[\s~])(?:[A-Za-z]{3,}|[ckm]m|[km]g|m[li]|ft|in|oz|lb|hr)[A-Za-z .°]*|\^?\{?\\circ\}?|°)\.?"
)
_WRAPS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), (r"\displaystyle", ""))
_STYLED = re.compile(r"\\(?:text|textbf|mathbf|mathrm|mbox)\{([^{}]*)\}")


def all_boxed(text: str) -> list[str] | None:
    r"""The contents of all closed boxes that are not inside another, in order; None when the text has too many to be answers."""
    out: list[str] = []
    end = -1
    for box in BOX.finditer(text):
        if box.start() < end:
            continue
        if len(out) == MAX_BOXES:
            return None
        if text[box.end() : box.end() + 8].lstrip().startswith("{"):
            opening = text.index("{", box.end())
            content = braced(text, opening, len(text))
            if content is None:
                return out
            out.append(content)
            end = opening + len(content) + 2
    return out


def _joined_boxes(text: str, between: re.Pattern[str] = _BETWEEN_BOXES) -> str | None:
    r"""The last boxes of the text as one list, where nothing but commas, "and" and "or" stands between them; None for a single box."""
    last = list(BOX.finditer(text))[-MAX_BOXES:]
    if len(last) < 2:
        return None
    run: list[str] = []
    end = -1
    for box in last:
        opening = text.find("{", box.end(), box.end() + 8)
        content = braced(text, opening, len(text)) if opening >= 0 else None
        if content is None:
            return None
        if box.start() < end:
            continue
        if not between.fullmatch(text, end, box.start()) if end >= 0 else False:
            run = []
        run.append(content)
        end = opening + len(content) + 2
    return ", ".join(run) if len(run) > 1 else None


def marked_answer(text: str) -> str | None:
    r"""The final answer that the text marks as such: the last `\boxed{}`, `<answer></answer>`, or line after "Answer:", "answer is", "####"."""
    boxed = last_boxed(text)
    if boxed is not None:
        return _joined_boxes(text) or boxed
    close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, close) if close >= 0 else -1
    if start >= 0:
        inside = text[start + len("<answer>") : close]
        return last_boxed(inside) or unwrap(inside)
    marks = list(_MARKER.finditer(text))
    if not marks:
        return None
    line = text[marks[-1].end() :].lstrip().split("\n", 1)[0]
    return unwrap(line) or None


def last_number(text: str) -> str | None:
    """The last plain number in the text, as it is written there."""
    end = next((i + 1 for i in range(len(text) - 1, -1, -1) if text[i].isdigit()), 0)
    found = [m[0] for m in _IN_TEXT.finditer(text, max(0, end - 2 * MAX_NUMBER), min(len(text), end + 1))]
    return next((n for n in reversed(found) if any(map(str.isdigit, n)) and len(n) <= MAX_NUMBER), None)


def final_answer(text: str, *, numeric: bool) -> str | None:
    """The marked answer; where the reference is a number (`numeric`), also the last number of an unmarked text.

    A text that was cut off inside a box has no answer: of "\\boxed{42" nobody knows whether it would have been 420.
    """
    marked = marked_answer(text)
    return last_number(text) if marked is None and numeric and not BOX.search(text) else marked


def unwrap(answer: str) -> str:
    """The answer without surrounding white space, math delimiters, bold marks and a final full stop."""
    answer = answer.strip()
    for _ in range(16):  # bounded, so that a text of nothing but delimiters stays cheap
        before = answer
        for opening, closing in _WRAPS:
            if opening == "$" and len(answer) > 2 and re.search(r"(?<!\\)\$", answer[1:-1]):
                continue  # $1$ or $2$
            if len(answer) > len(opening) + len(closing) and answer.startswith(opening) and answer.endswith(closing):
                answer = answer[len(opening) : len(answer) - len(closing)].strip()
        if answer.endswith(".") and not answer.endswith((r"\.", "..")):
            answer = answer[:-1].rstrip()
        if answer == before:
            break
    return answer


def number_of(answer: str) -> Fraction | None:
    r"""The exact value of a plain number: signs, thousands commas, leading zeros and a currency sign are understood. None for all else.

    Example: number_of("1,000") == 1000; number_of(r"\textbf{(073)}") == 73; number_of("27.0") == 27; number_of("x") is None
    """
    text = re.sub(r"^([-+]?)\s*[$€£]\s*", r"\1", _plain_latex(answer))
    mantissa = text.lower().partition("e")[0]
    if (
        len(text) > MAX_NUMBER
        or not text.isascii()
        or not _NUMBER.fullmatch(text)
        or not any(map(str.isdigit, mantissa))
    ):
        return None
    return Fraction(text.replace(",", ""))


def number_with_unit(answer: str) -> Fraction | None:
    r"""As `number_of`, with a unit in words or degrees after the number: "5 apples", r"12\text{ km}", r"90^\circ".

    Example: number_with_unit("5 apples") == 5; number_with_unit("5 million") == 5_000_000; number_with_unit("5 pi") is None
    """
    value = number_of(answer)
    if value is not None:
        return value
    text = _plain_latex(answer)
    number = _NUMBER_FIRST.match(text[:MAX_NUMBER])
    if number is None or len(text) - number.end() > 64:
        return None
    unit = _UNIT.fullmatch(text, number.end())
    value = number_of(number[0])
    if unit is None or value is None or _NOT_UNITS.search(unit[0]):
        return None
    scale = _SCALE.match(unit[0])
    return value * (_SCALES[scale[1].lower()] if scale else 1)


def _plain_latex(answer: str) -> str:
    """The answer without spacing commands, escapes and a text style around all of it: r"\textbf{(073)}" becomes "073"."""
    text = unwrap(answer)
    styled = _STYLED.fullmatch(text)
    text = styled[1].strip(" ()") if styled else text
    for latex, simple in (("−", "-"), (r"\!", ""), (r"\,", ""), ("{,}", ","), (r"\$", "$")):
        text = text.replace(latex, simple)
    return text


def gold_answer(columns: Mapping[str, Any], column: str | None) -> str:
    r"""The reference answer of a row: from `column`, else from `answer`, else from `solution`.

    A worked solution gives its last `\boxed{}`, or what follows "####" or "Answer:". Raises DataError when there is none.
    """
    names = [column] if column else ["answer", "solution"]
    value = next((columns[n] for n in names if columns.get(n) is not None), None)
    if value is None:
        raise DataError(
            f"the row has no reference answer: {' and '.join(names)} absent or null (columns: {', '.join(sorted(columns))})"
        )
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"a reference answer is a text or a number; this one is a {type(value).__name__}: {str(value)[:80]}"
        )
    text = str(value).strip()
    answer = marked_answer(text) if any(m in text for m in (r"\boxed", r"\fbox", "####", "<answer>", "nswer")) else None
    # A reference does not hedge: its boxes in one sentence are one answer.
    answer = unwrap(_joined_boxes(text, _BETWEEN_GOLD_BOXES) or (text if answer is None else answer))
    if not unwrap(answer):
        raise DataError("the reference answer is empty")
    # A worked solution without a mark: parsing all of it as one formula would be slow, and right by accident only.
    prose = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", answer)) > 15 or ("\n" in answer and r"\begin" not in answer)
    if len(answer) > 600 or prose:
        raise DataError(f"no final answer is marked in this text of {len(answer)} characters: {answer[:80]!r}")
    return unwrap(answer)


def same_text(a: str, b: str) -> bool:
    """Equality but for white space, LaTeX spacing, text wrappers, fraction styles and the case of words."""
    return _canonical(a) == _canonical(b)


def _canonical(answer: str) -> str:
    text = _STYLED.sub(r"\1", unwrap(answer))
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\left", "").replace(r"\right", "")
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", text)  # 2 1/2 is not 21/2
    text = re.sub(r"\\[,;:!]|\\ |\s|~", "", text).replace("−", "-")
    # Single letters are names of variables, in which case matters; words are not.
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text
