"""Rewards for the language of a completion, and its likeness to a reference translation."""

from __future__ import annotations

import importlib
import importlib.util
import unicodedata
from collections import Counter
from typing import Any

from llmrl.errors import RewardError
from llmrl.rewards.base import row_verifier
from llmrl.rewards.text import body

# Which scripts a language is written in; every other language's is Latin.
_SCRIPTS: dict[str, tuple[str, ...]] = {
    "zh": ("CJK",), "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"), "ko": ("HANGUL", "CJK"), "ru": ("CYRILLIC",),
    "uk": ("CYRILLIC",), "bg": ("CYRILLIC",), "mk": ("CYRILLIC",), "sr": ("CYRILLIC", "LATIN"), "el": ("GREEK",), "he": ("HEBREW",),
    "ar": ("ARABIC",), "fa": ("ARABIC",), "ur": ("ARABIC",), "hi": ("DEVANAGARI",), "mr": ("DEVANAGARI",), "ne": ("DEVANAGARI",),
    "bn": ("BENGALI",), "pa": ("GURMUKHI",), "gu": ("GUJARATI",), "ta": ("TAMIL",), "te": ("TELUGU",), "kn": ("KANNADA",),
    "ml": ("MALAYALAM",), "th": ("THAI",), "ka": ("GEORGIAN",), "hy": ("ARMENIAN",), "am": ("ETHIOPIC",),
}  # fmt: skip


def scripts_of(text: str) -> Counter[str]:
    """How many letters of each script a text has."""
    out: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            out[unicodedata.name(letter, "UNKNOWN").split()[0]] += count
    return out


def _check_language(*, language: str) -> str | None:
    return (
        None
        if language.isalpha() and language.islower() and len(language) == 2
        else f"language must be a code like en, given {language!r}"
    )


@row_verifier(safe=True, check_args=_check_language)
def language_consistency(completion: str, *, language: str) -> float:
    """The share of the letters that are of the language's script, 0.0 without letters: a completion that drifts into another script loses
    (DeepSeek-R1's reward, arXiv 2501.12948, section 2.3.2, counted in letters). Languages of one script are not told apart: for that see
    `instructions`.

    Example: language_consistency.score("abc где", language="en") -> 0.5
    """
    counts = scripts_of(completion)
    total = counts.total()
    return sum(counts[s] for s in _SCRIPTS.get(language, ("LATIN",))) / total if total else 0.0


def _sacrebleu() -> Any:
    try:
        return importlib.import_module("sacrebleu")
    except ImportError as error:
        raise RewardError("bleu and chrf need the package sacrebleu: pip install 'llmrl[graders]'") from error


def _warm_up() -> None:
    if importlib.util.find_spec("sacrebleu") is not None:
        _sacrebleu()


def _references(answer: Any) -> list[str]:
    return [a for a in (answer if isinstance(answer, list | tuple) else [answer]) if isinstance(a, str) and a.strip()]


def _no_reference(*, answer: Any = None, **_: Any) -> str | None:
    if not _references(answer):
        return f"there is no reference text in {answer!r}"
    try:
        _sacrebleu()
    except RewardError as error:
        return str(error)
    return None


@row_verifier(check_gold=_no_reference, warm_up=_warm_up)
def bleu(completion: str, answer: Any) -> float | None:
    """Sentence BLEU from 0 to 1 (sacrebleu, 13a tokens, exponential smoothing) to one or several references; None without any."""
    references = _references(answer)
    return (
        max(0.0, min(1.0, _sacrebleu().sentence_bleu(body(completion), references).score / 100)) if references else None
    )


@row_verifier(check_gold=_no_reference, warm_up=_warm_up)
def chrf(completion: str, answer: Any) -> float | None:
    """Sentence chrF2 from 0 to 1 (sacrebleu) to one or several references; None without any."""
    references = _references(answer)
    return (
        max(0.0, min(1.0, _sacrebleu().sentence_chrf(body(completion), references).score / 100)) if references else None
    )
