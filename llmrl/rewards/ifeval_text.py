"""Words, sentences and the language of a response, as the instructions of IFEval count them. No downloads; linear in the text."""

from __future__ import annotations

import re

from llmrl.errors import RewardError

# The codes that langdetect knows, which are those that IFEval may ask for.
LANGUAGES = frozenset(
    [
        "af", "ar", "bg", "bn", "ca", "cs", "cy", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "gu", "he",
        "hi", "hr", "hu", "id", "it", "ja", "kn", "ko", "lt", "lv", "mk", "ml", "mr", "ne", "nl", "no", "pa", "pl",
        "pt", "ro", "ru", "sk", "sl", "so", "sq", "sv", "sw", "ta", "te", "th", "tl", "tr", "uk", "ur", "vi", "zh-cn",
        "zh-tw",
    ]
)  # fmt: skip
NEEDS_LANGDETECT = "telling languages apart needs the package langdetect: pip install 'llmrl[graders]'"

_ABBREVIATIONS = frozenset(
    [
        "mr", "mrs", "ms", "dr", "prof", "sr", "jr", "st", "rev", "hon", "gen", "col", "capt", "lt", "sgt", "gov",
        "sen", "rep", "pres", "vs", "etc", "e.g", "i.e", "cf", "al", "inc", "ltd", "co", "corp", "dept", "fig", "vol",
        "ch", "approx", "est", "jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec",
        "u.s", "u.k", "a.m", "p.m", "ph.d", "m.d", "b.a", "m.a", "p.s", "p.p.s",
    ]
)  # fmt: skip
# An abbreviation of these ends a sentence as well, where the next word is one that sentences begin with.
_MAY_END = frozenset(
    [
        "etc", "inc", "ltd", "co", "corp", "u.s", "u.k", "a.m", "p.m", "ph.d", "m.d", "b.a", "m.a", "al",
    ]
)  # fmt: skip
_BEGINS = frozenset(
    [
        "the", "a", "an", "it", "he", "she", "they", "we", "i", "you", "this", "that", "these", "those", "there",
        "here", "in", "on", "at", "but", "and", "so", "or", "however", "then", "when", "if", "as", "for", "my", "our",
        "his", "her", "its", "their", "what", "who", "why", "how",
    ]
)  # fmt: skip
_END = re.compile(r"([.!?…]+)[\"'”’»)\]*_]*(?=\s|$)|[。！？।۔؟]+[\"'”’»)\]」』]*")
_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+(?:[-./]\w+)*")
_LIST_NUMBER = re.compile(r"(?:\d{1,3}|[A-Za-z])")
_DETECTED_CHARACTERS = 20_000


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores: "don't" is two words, as IFEval counts.

    Example: count_words("It's 5 o'clock.") -> 5
    """
    return sum(1 for _ in _WORD.finditer(text))


def count_capital_words(text: str) -> int:
    """Words without a small letter and with a capital; a word goes on over hyphens, slashes and dots inside it.

    Example: count_capital_words("I saw NASA, COVID-19 and Bob") -> 3
    """
    return sum(1 for match in _TOKEN.finditer(text) if match.group().isupper())


def count_sentences(text: str) -> int:
    """Pieces that end in terminal punctuation, and a last one that does not. A line break alone ends no sentence.

    A full stop ends none behind a usual abbreviation, an initial, the number of a list item, or before a small letter.

    Example: count_sentences("Dr. Who paid 3.50. Really? Yes!") -> 3
    """
    count, start = 0, 0
    for match in _END.finditer(text):
        if match.group(1) is not None and set(match.group(1)) <= {".", "…"} and not _ends_sentence(text, start, match):
            continue
        if _WORD.search(text, start, match.start()):
            count += 1
        start = match.end()
    return count + (1 if _WORD.search(text, start) else 0)


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether full stops end one: `start` is where the sentence began."""
    following = _WORD.search(text, match.end(), match.end() + 20)
    if following and following.group()[0].islower():
        return False
    if len(match.group(1)) > 1:
        return True
    word = re.search(r"\S*\Z", text[max(start, match.start() - 20) : match.start()])
    before = (word.group() if word else "").lstrip("(\"'“‘*_[").lower()
    if _LIST_NUMBER.fullmatch(before):
        line = "\n" * (match.start() < 12) + text[max(0, match.start() - 12) : match.start()]
        if re.search(r"\n[ \t*_#>-]*\w+\Z", line):
            return False  # "2. Second": the item's number
        return before.isdigit() or before == "i"  # "in 5." ends one, the initial in "J. Bach" doesn't
    if before in _ABBREVIATIONS:
        return not following or (before in _MAY_END and following.group().lower() in _BEGINS)
    return True


def language_of(text: str) -> str | None:
    """The text's language as langdetect's code (ISO 639-1, and zh-cn, zh-tw), the same for the same text; None where it has no words.

    Raises RewardError without langdetect.
    """
    try:
        from langdetect import DetectorFactory, LangDetectException, detect
    except ImportError as error:
        raise RewardError(NEEDS_LANGDETECT) from error
    DetectorFactory.seed = 0
    try:
        return str(detect(text[:_DETECTED_CHARACTERS]))
    except LangDetectException:
        return None
