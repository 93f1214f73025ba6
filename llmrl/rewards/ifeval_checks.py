"""The 25 types of verifiable instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911, table 1).

Each check takes the response and the instruction's `kwargs` by name, and says whether the response follows it. All are linear.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmrl.rewards.ifeval_text import LANGUAGES, count_capital_words, count_sentences, count_words, language_of

RELATIONS = ("at least", "less than")
FENCE = re.compile(r"\A```(?:json)?(.*?)(?:```)?\Z", re.DOTALL | re.IGNORECASE)


def _related(count: int, relation: str, bound: int) -> bool:
    return count >= bound if relation == "at least" else count < bound


def _occurrences(text: str, word: str) -> int:
    return text.lower().count(word.lower())


def keyword_existence(text: str, keywords: Sequence[str]) -> bool:
    """Every keyword occurs, in any case and also within a longer word."""
    return all(_occurrences(text, word) for word in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword's occurrences, counted as in `keyword_existence`, without overlap."""
    return _related(_occurrences(text, keyword), relation, frequency)


def forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """None of them occurs as a whole word, in any case."""
    return not any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE) for w in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A letter's (or another character's) occurrences, in any case."""
    return _related(_occurrences(text, letter), let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
    """The whole response is in one language."""
    return language_of(text) == language


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly so many, with `***` between them. Nothing may be empty but what is before the first and behind the last divider."""
    parts = [part.strip() for part in re.split(r"\*\*\*", text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def number_words(text: str, num_words: int, relation: str) -> bool:
    return _related(count_words(text), relation, num_words)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _related(count_sentences(text), relation, num_sentences)


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, with an empty line between them, and one of them begins with that word, in any case."""
    paragraphs = [p.strip() for p in text.split("\n\n") if p.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    first = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"“‘*_")
    return re.split(r"[.,?!'\"”’*_:;]", first)[0].lower() == first_word.lower()


def postscript(text: str, postscript_marker: str) -> bool:
    """A postscript, told by its marker, in any case; after a dot of P.S. or P.P.S there may be a space."""
    usual = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = usual.get(postscript_marker.strip()) or re.escape(postscript_marker.strip())
    return re.search(pattern, text, re.IGNORECASE) is not None


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many of the form [name], each within a line."""
    count = 0
    for line in text.split("\n"):
        end = -1
        while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
            count += 1
    return count >= num_placeholders


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with `*` or `-`; a line that begins with `**` is bold."""
    lines = [line.lstrip() for line in text.split("\n")]
    return sum(line[:1] == "-" or (line[:1] == "*" and line[1:2] not in ("", "*")) for line in lines) == num_bullets


def constrained_response(text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """At least so many of *these* and **these**, each within a line."""
    single = [m for m in re.findall(r"\*([^\n*]*)\*", text) if m.strip()]
    double = [m for m in re.findall(r"\*\*([^\n*]*)\*\*", text) if m.strip()]
    return len(single) + len(double) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings: the word as it was given, and a number."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    """The whole response is JSON, perhaps in a fence."""
    text = text.strip()
    fenced = FENCE.match(text)
    try:
        json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """A line with a <<title>>."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end >= start + 3 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def two_responses(text: str) -> bool:
    """Two different ones, with `******` between them; a divider may also stand before and behind them."""
    parts = [part.strip() for part in text.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The response begins with the request, in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    """The response ends with the phrase, in any case; quotation marks behind it do no harm."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """The whole response is in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def english_capital(text: str) -> bool:
    """English, without a small letter. The language is told from the text in small letters, which detectors are made for."""
    return text.isupper() and language_of(text.lower()) == "en"


def english_lowercase(text: str) -> bool:
    """English, without a capital letter."""
    return text.islower() and language_of(text) == "en"


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words that are all capitals; "I" and "A" are some."""
    return _related(count_capital_words(text), capital_relation, capital_frequency)


def no_comma(text: str) -> bool:
    return "," not in text


CHECKS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": keyword_existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:postscript": postscript,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "change_case:capital_word_frequency": capital_word_frequency,
    "punctuation:no_comma": no_comma,
}
USE_LANGUAGES = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")


def names_of(instruction: str) -> tuple[str, ...]:
    """The names of the kwargs that an instruction takes."""
    return tuple(inspect.signature(CHECKS[instruction]).parameters)[1:]


def problem_with(name: str, value: Any) -> str | None:
    """Why a keyword argument of an instruction can't be used, or None."""
    if name in ("keywords", "forbidden_words"):
        fine = isinstance(value, list | tuple) and value and all(isinstance(v, str) and v.strip() for v in value)
        return None if fine else f"{name} must be a list of words, given {value!r}"
    if name.endswith("relation"):
        return None if value in RELATIONS else f"{name} must be {' or '.join(map(repr, RELATIONS))}, given {value!r}"
    if name == "language":
        return None if value in LANGUAGES else f"language {value!r} is none of {' '.join(sorted(LANGUAGES))}"
    if name.startswith("num_") or name.endswith("frequency") or name == "nth_paragraph":
        whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1 and value >= 1
        return None if whole else f"{name} must be a whole number from 1, given {value!r}"
    if not isinstance(value, str) or not value.strip() or (name == "letter" and len(value.strip()) != 1):
        return f"{name} must be {'one character' if name == 'letter' else 'a text'}, given {value!r}"
    return None
