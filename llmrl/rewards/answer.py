"""The final answer in a text, and plain numbers. Linear in the length of the text, whatever is in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from llmrl.errors import DataError

MAX_NUMBER = 400  # characters of what is read as a plain number
_NUMBER = r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER_RE = re.compile(_NUMBER)
_IN_TEXT = re.compile(r"(?<![\w.,])[-+−]?\$?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)?(?:\.\d+)?(?=$|\D)")
_MARKER = re.compile(r"(?:(?:final )?answer(?: is)?[*_]*[:：][*_]*|answer is[*_]*|####)", re.IGNORECASE)
# A word after a number that makes it another number: such an answer is not "a number and its unit".
_NOT_UNITS = frozenset(
    (
        "pi sqrt root log ln exp sin cos tan theta percent half third quarter dozen hundred thousand million billion trillion "
        "or and to times plus minus over mod squared cubed factorial"
    ).split()  # noqa: SIM905
)
_UNIT = re.compile(
    r"(?:\\?\s|~)*(?:\\(?:text|mathrm|mbox|textbf)\{\s*([A-Za-z .°]+)\}|(?<=\s)([A-Za-z][A-Za-z .°]+)|\^?\{?\\circ\}?|°)?\.?"
)
_WRAPS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), (r"\displaystyle", ""))


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}` or `\fbox{...}`, nested braces included; None when there is none.

    Example: last_boxed(r"\boxed{1} so \boxed{\frac{1}{2}}") -> r"\frac{1}{2}"
    """
    end = len(text)
    while (start := max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))) >= 0:
        opening = start + (6 if text.startswith(r"\boxed", start) else 5)
        rest = text[opening : opening + 64].lstrip()
        if rest.startswith("{"):
            content = _braced(text, text.index("{", opening), end)
            if content is not None:
                return content
        elif opening < end and (plain := re.match(r"\s+([^\s$\\{}]{1,32})", text[opening : opening + 64])):
            return plain[1]
        # An unclosed box was cut off by the length limit: what is inside it is no answer, and the search goes on before it.
        end = start
    return None


def _braced(text: str, opening: int, end: int) -> str | None:
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[opening:end], re.DOTALL):
        if brace[0] in "{}":
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return text[opening + 1 : opening + brace.start()]
    return None


def marked_answer(text: str) -> str | None:
    r"""The final answer that the text marks as such: the last `\boxed{}`, `<answer></answer>`, or line after "Answer:", "answer is", "####"."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
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
    # Backwards in windows would be faster on long texts; one pass of a linear pattern is enough.
    found = None
    for match in _IN_TEXT.finditer(text):
        if any(c.isdigit() for c in match[0]) and len(match[0]) <= MAX_NUMBER:
            found = match[0]
    return found


def final_answer(text: str, *, numeric: bool) -> str | None:
    """The marked answer; where the reference is a number (`numeric`), also the last number of an unmarked text."""
    marked = marked_answer(text)
    return last_number(text) if marked is None and numeric else marked


def unwrap(answer: str) -> str:
    """The answer without surrounding white space, math delimiters, bold marks and a final full stop."""
    before = None
    answer = answer.strip()
    while answer != before:
        before = answer
        for opening, closing in _WRAPS:
            inside = len(answer) > len(opening) + len(closing)
            if inside and answer.startswith(opening) and answer.endswith(closing) and (closing or opening != answer):
                answer = answer[len(opening) : len(answer) - len(closing)].strip()
        if answer.endswith(".") and not answer.endswith(r"\."):
            answer = answer[:-1].rstrip()
    return answer


def number_of(answer: str) -> Fraction | None:
    r"""The exact value of a plain number: signs, thousands commas, leading zeros and a currency sign are understood. None for all else.

    Example: number_of("1,000") == 1000; number_of("073") == 73; number_of("27.0") == 27; number_of("x") is None
    """
    text = unwrap(answer).replace("−", "-").replace(r"\!", "").replace(r"{,}", ",").replace(r"\$", "$")
    text = re.sub(r"^([-+]?)\s*[$€£]\s*", r"\1", text)
    text = re.sub(r"\.$", "", text)
    if (
        not text
        or len(text) > MAX_NUMBER
        or not text.isascii()
        or not _NUMBER_RE.fullmatch(text)
        or not any(c.isdigit() for c in text)
    ):
        return None
    return Fraction(text.replace(",", ""))


def number_with_unit(answer: str) -> Fraction | None:
    r"""As `number_of`, with a unit in words or degrees after the number: "5 apples", r"12\text{ km}", r"90^\circ".

    Example: number_with_unit("5 apples") == 5; number_with_unit("5 pi") is None
    """
    text = unwrap(answer).replace(r"\!", "").replace(r"{,}", ",").replace(r"\$", "$")
    number = re.match(r"[-+−]?\s*[$€£]?\s*(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?", text[:MAX_NUMBER])
    if number is None or not number[0]:
        return None
    unit = _UNIT.fullmatch(text[number.end() : number.end() + 64]) if len(text) - number.end() <= 64 else None
    if unit is None or _NOT_UNITS & set((unit[1] or unit[2] or "").lower().replace(".", " ").split()):
        return None
    return number_of(number[0])


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
    answer = marked_answer(text) if any(m in text for m in (r"\boxed", r"\fbox", "####", "<answer>")) else None
    answer = text if answer is None else answer
    if not unwrap(answer):
        raise DataError("the reference answer is empty")
    if len(answer) > 1000 or answer.count("\n") > 3:
        raise DataError(f"no final answer is marked in this text of {len(answer)} characters: {answer[:80]!r}")
    return unwrap(answer)


def same_text(a: str, b: str) -> bool:
    """Equality but for white space, LaTeX spacing, text wrappers, fraction styles and the case of words."""
    return _canonical(a) == _canonical(b)


def _canonical(answer: str) -> str:
    text = unwrap(answer)
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\{([^{}]*)\}", r"\1", text)
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").replace(r"\left", "").replace(r"\right", "")
    text = re.sub(r"\\[,;:!]|\\ |\s|~", "", text).replace("−", "-")
    # Single letters are names of variables, in which case matters; words are not.
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text
