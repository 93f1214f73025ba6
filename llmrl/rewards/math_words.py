"""Numbers and times of day in words: "forty-five" is 45, "8:34 p.m." is 20:34."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
_TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12}  # fmt: skip
_WORD = "|".join(
    sorted([*_UNITS, *_TENS, "hundred", *_SCALES, *(p + "s" for p in _PARTS), *_PARTS, "halves"], key=len, reverse=True)
)
_RUN = re.compile(rf"\b(?:(?:minus|negative)\s+)?(?:{_WORD})(?:(?:\s+|-)(?:and\s+)?(?:{_WORD}))*\b", re.IGNORECASE)
_TIME = re.compile(r"(\d{1,2})(?::|\{:\})(\d{2})\s*([ap])\.?\s?m\.?", re.IGNORECASE)


def number_in_words(text: str) -> Fraction | None:
    """The value of a cardinal number of at most 12 words, or of a fraction such as "three quarters"; None for all else.

    Example: number_in_words("one hundred forty-five") == 145; number_in_words("minus two thirds") == Fraction(-2, 3); number_in_words("one apple") is None
    """
    words = re.split(r"[\s-]+", text.lower().strip())
    if not words or len(words) > 12:
        return None
    if words[0] in ("minus", "negative") and len(words) > 1:
        value = number_in_words(" ".join(words[1:]))
        return None if value is None or value < 0 else -value
    if words[0] in ("a", "an") and words[1:2] != [] and words[1] in ("dozen", "hundred", "thousand", "million"):
        return number_in_words(" ".join(["one", *words[1:]]))
    if len(words) == 2 and (part := _PARTS.get(words[1].removesuffix("s").replace("halve", "half"))):
        several = words[1].endswith("s")
        count = 1 if words[0] in ("a", "an") else _UNITS.get(words[0], 0)
        return Fraction(count, part) if count and several == (count > 1) else None
    total = group = 0
    for before, word in zip(["", *words], words, strict=False):
        if word in _UNITS:
            if before in _UNITS or (before in _TENS and not 0 < _UNITS[word] < 10):
                return None
            group += _UNITS[word]
        elif word in _TENS:
            if before in _UNITS or before in _TENS:
                return None
            group += _TENS[word]
        elif word == "dozen" and total == 0 and group < 100:
            group = 12 * (group or 1)
        elif word == "hundred" and before in _UNITS and 0 < group < 100:
            group *= 100
        elif word in _SCALES and group:
            total, group = total + group * _SCALES[word], 0
        elif word != "and" or before != "hundred":
            return None
    return Fraction(total + group)


def spoken_number(text: str) -> str | None:
    """The number in words that a text holds, where it is the only one; "one" alone, often a pronoun, is none."""
    runs = [r for r in _RUN.findall(text) if number_in_words(r) is not None]
    return runs[0] if len(runs) == 1 and runs[0].lower() != "one" else None


def time_of_day(text: str) -> tuple[int, int] | None:
    """Hours from 0 to 23 and minutes of "8:34 p.m."; None for all else."""
    found = _TIME.fullmatch(text.strip())
    if found is None or not 1 <= int(found[1]) <= 12 or int(found[2]) > 59:
        return None
    return int(found[1]) % 12 + (12 if found[3].lower() == "p" else 0), int(found[2])
