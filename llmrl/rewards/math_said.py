"""What the words around an answer make of it: "not 5" is no answer, "at least 5" is an interval, a question answers nothing."""

from __future__ import annotations

import re

_BOLD = re.compile(r"(?<![\w)\]}*])\*\*(?=[^\s*])((?:[^*\n]|\*(?!\*))+?)(?<=\S)\*\*(?![\w(*])")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_QUESTION = re.compile(r"(?:^|(?<=[.!?]\s)|(?<=\n))(?:[^.!?\n]|\.(?=\S))*[?？](?=\s|$)")
_SENTENCE = re.compile(r"[.!?]\s+(?=[A-Z\[<$])")
# A run of white space is looked at from its first character only: from each of them would take its length squared.
_REASON = re.compile(r"(?:,|(?<!\s))\s+(?:since|because)\s|,\s+as\s(?!well\b|required\b)")
_CONCLUDES = re.compile(r"\b(?:so|thus|hence|therefore|then|gives?|get|obtain|answer)\b", re.IGNORECASE)
_EITHER = re.compile(r"\b(?:either|both)\s+(?=\S)", re.IGNORECASE)
_WINDOW = 80
# What comes before one of these says nothing of what comes after.
_CLAUSE = re.compile(
    r"[,;:?!\n]|\.\s|\d\s*=|\b(?:but|so|and|then|that|because|hence|since|as|thus|therefore|is|are|was|were|gives?|which|when|where|if|only|just"
    r"|answer|we|it|he|she|they|you|I|there)\b"
)
_NOT_TRUE = re.compile(
    r"(?:\bnot (?:true|the case|correct)|n't (?:true|the case|correct)|\bfalse|\bwrong) (?:that|to say)\b",
    re.IGNORECASE,
)
_ASKED = re.compile(r"\b(?:whether|not (?:true|the case) that|untrue that)\b[^.!?\n]*$", re.IGNORECASE)
_NOT = re.compile(r"\b(?:not|never|cannot|neither|nor|no)\b|n['’]t\b", re.IGNORECASE)
_NOT_SO = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bcannot|\b(?:all|anything|everything|any) but|\bexcept(?: for)?)(?: be| equal(?: to)?)?[\s$(]*$",
    re.IGNORECASE,
)
_WRONG_AFTER = re.compile(
    r"[\s$)\]\\}*]*(?:(?:is|are|was|were|does|do|did|can|could|would|will|has|have)(?:n['’]t|\s+not)\b|cannot\b|can['’]t\b|won['’]t\b|fails?\b"
    r"|(?:is|are|was|were|seems?)\s+(?:wrong|incorrect|impossible|extraneous|false|invalid|rejected|excluded|discarded|too\b|no\b))",
    re.IGNORECASE,
)
_OPENED = r"(?:\s|\$|\\\(|\\\[)*$"
_MORE, _LESS = "(?:more|greater|larger|higher|bigger)", "(?:less|fewer|smaller|lower)"
_BEFORE = (
    (re.compile(rf"\b(?:at least|no(?:t|) {_LESS} than|{_MORE} than or equal to){_OPENED}", re.IGNORECASE), r"[{}, \infty)"),
    (re.compile(rf"\b(?:at most|up to|no(?:t|) {_MORE} than|{_LESS} than or equal to){_OPENED}", re.IGNORECASE), r"(-\infty, {}]"),
    (re.compile(rf"\b(?:{_MORE} than|exceeds){_OPENED}", re.IGNORECASE), r"({}, \infty)"),
    (re.compile(rf"\b{_LESS} than{_OPENED}", re.IGNORECASE), r"(-\infty, {})"),
)  # fmt: skip
# "He can miss at most 7" tells how many, and is no inequality.
_ATTAINED = re.compile(
    rf"\b(?:(?:can|could)\b[^.;]*\bat most|(?:needs?|should)\b[^.;]*\bat least){_OPENED}", re.IGNORECASE
)
_AFTER = (
    (re.compile(rf"(?:\$|\\\))?\s*(?:[a-z]+\s+)?(?:or (?:{_MORE}|above|over)|and (?:above|up))\b", re.IGNORECASE), r"[{}, \infty)"),
    (re.compile(rf"(?:\$|\\\))?\s*(?:[a-z]+\s+)?(?:or (?:{_LESS}|below|under)|and below)\b", re.IGNORECASE), r"(-\infty, {}]"),
)  # fmt: skip
_BETWEEN = re.compile(
    r"\b((?:strictly|exclusively)\s+)?between\s+\$?([^\s$]{1,40}?)\$?,?\s+and\s+\$?([^\s$]{1,40}?)\$?(?:[\s,(]+(inclusive|exclusive)(?:ly)?\)?)?[\s.!)$]*$",
    re.IGNORECASE,
)
_POLAR = re.compile(
    r"(?:^|(?<=[.!?:]\s)|(?<=[\n>]))[ \t*]{0,8}(yes|no|true|false)(?=[ \t]{0,8}(?:[,.!;:—*\n]|$))", re.IGNORECASE
)


def plain(text: str) -> str:
    """The text without bold and code marks, and without "either" and "both"."""
    text = _CODE.sub(r"\1", _BOLD.sub(r"\1", text)) if "*" in text or "`" in text else text
    return _EITHER.sub("", text)


def without_questions(text: str) -> str:
    """The text without its questions, in which nothing is answered."""
    return _QUESTION.sub(" ", text) if "?" in text or "？" in text else text


def without_reason(text: str) -> str:
    """The text without what its last sentence gives for a reason: "it is 3, since the other is 5" says 3."""
    start = max(text.rfind("\n"), max((m.end() for m in _SENTENCE.finditer(text, max(0, len(text) - 600))), default=0))
    reason = _REASON.search(text, start)
    if reason is None or not re.search(r"\d", text[start : reason.start()]) or _CONCLUDES.search(text, reason.end()):
        return text
    return text[: reason.start()]


def asked_about(text: str, start: int) -> bool:
    """Whether what begins at `start` is what a sentence asks about, or says to be untrue: "check whether the answer is 96"."""
    return _ASKED.search(text, max(0, start - _WINDOW), start) is not None


def denied(text: str, start: int) -> bool:
    """Whether what begins at `start` is said not to be so, just before: "it is not 36"."""
    return _NOT_SO.search(text[max(0, start - 40) : start]) is not None


def rejected(text: str, end: int) -> bool:
    """Whether what ends at `end` is said not to be so, just after: "5 is too large"."""
    return _WRONG_AFTER.match(text, end) is not None


def qualified(text: str, answer: str, *, first: bool = False) -> str | None:
    r"""The answer with what is said of it: None where it is denied, an interval for a bound ("at least 5"), else as it is.

    first: the first place in the text where it stands is meant, and not the last.

    Example: qualified("so it is at least 5.", "5") -> r"[5, \infty)"
    """
    start = text.find(answer) if first else text.rfind(answer)
    if start < 0:
        return answer
    end = start + len(answer)
    if (between := _BETWEEN.search(text, max(0, start - 200))) is not None and between.start() < start:
        return _interval(between)
    before = text[max(0, start - _WINDOW) : start]
    for bound, interval in _BEFORE:
        if bound.search(before) and not _ATTAINED.search(before):
            return interval.format(answer.strip(" $."))
    for bound, interval in _AFTER:
        if bound.match(text, end):
            return interval.format(answer.strip(" $."))
    clause = _CLAUSE.split(before)[-1]
    if denied(text, start) or _NOT.search(clause) or _NOT_TRUE.search(before) or rejected(text, end):
        return None
    return answer


def between(text: str) -> str | None:
    """The interval that a text ends with in words, "between 1 and 3 inclusive"; None where the words leave the ends open."""
    found = _BETWEEN.search(text[-300:])
    return None if found is None else _interval(found)


def _interval(found: re.Match[str]) -> str | None:
    if found[4] is None and found[1] is None:
        return None  # nobody knows whether the ends are meant
    is_open = found[1] is not None or found[4].lower() == "exclusive"
    return ("({}, {})" if is_open else "[{}, {}]").format(found[2], found[3])


def yes_or_no(text: str) -> str | None:
    """ "yes", "no", "true" or "false" where the last sentence that begins with one of them, and a comma or a stop, says so."""
    found = _POLAR.findall(text[-4000:])
    return found[-1].lower() if found else None
