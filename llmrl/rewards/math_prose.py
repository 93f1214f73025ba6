r"""Where a text says its answer that marks none: its last `$...$`, or what its last sentence ends with."""

from __future__ import annotations

import re

from llmrl.rewards.answer import last_boxed, last_number, number_with_unit
from llmrl.rewards.math_clean import unit_at
from llmrl.rewards.math_parse import MAX_CHARACTERS
from llmrl.rewards.math_read import reading
from llmrl.rewards.math_said import denied

MAX_TAILS = 8
_SPECIAL = re.compile(r"<\|[a-z_]+\|>", re.IGNORECASE)
_HOPE = re.compile(r"I hope (?:it|this|that)\b[^.\n]{0,40}\.?$", re.IGNORECASE)
_ATTAINED = re.compile(
    r",\s+(?:which is\s+)?(?:attained|achieved|reached|occurring|taken)\s+(?:at|when|for|if|by)\b[^.!?\n]{0,80}\.?$"
)
_INSTEAD = re.compile(r"\b(?:over|than|instead of|versus|vs\.?)\s+(?:option\s+|choice\s+)?$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\[<])|<\|")
_LETTER = re.compile(r"\(([A-J])\)|(?<![A-Za-z'$\\(])([B-HJ]|A(?! [a-z]))(?![A-Za-z'])")
_DENIAL = re.compile(r"\b(?:not|never|neither|nor|except|unlike|no)\b|n't\b|\?", re.IGNORECASE)
_OPTION = re.compile(r"(?:\b(?:or|and|nor)|,)[\s*\"]*$|\b(?:after|before|than)\s+(?:an?\s+|the\s+)?$", re.IGNORECASE)
_ADVERB = re.compile(
    r"^(?:therefore|thus|hence|then|indeed|simply|just|now|clearly|exactly|also)\b[,:]?\s*", re.IGNORECASE
)
_COMPUTED = re.compile(r"[\d)%]\s*=\s*(-?\$?\d+(?:[, ]\d{3}(?!\d))*(?:\.\d+)?)(?=[\s.!]|$)")
_GOES_ON = re.compile(
    r"[=?$\\]|\s*[-+*/^×·]|\b(?:is|are|was|were|isn|equals?|so|then|thus|hence|therefore|gives?|and|or|but|not|leaving|which|while)\b",
    re.IGNORECASE,
)
_LINES = re.compile(r"^\s*\\begin\{(align|aligned|gather|equation|eqnarray)\*?\}(.+?)\\end\{\1\*?\}[\s.]*$", re.DOTALL)
_IN_TIME = re.compile(r"\b(?:in|for|after|within|during|every|over)\s+(?:the\s+|just\s+|only\s+)?$")
_TIME_UNIT = re.compile(r"\s*(?:more\s+)?(?:second|minute|hour|day|week|month|year)s?\b")
_ASY = re.compile(r"\[asy\](?:(?!\[asy\]).)*?\[/asy\]", re.DOTALL)
_JOIN = re.compile(r"[\s,;]*(?:and|or)?[\s,;]*")
_SEGMENT = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\\)\$((?:\\\$|[^$])+?)(?<!\\)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]|(\\begin\{(align|aligned|gather|equation|eqnarray)\*?\}.+?\\end\{\6\*?\})",
    re.DOTALL,
)
_TAIL = re.compile(
    r"(?:\b(?:is|are|equals?|get|gets|gives?|makes?|comes to|totals|amounts to|at(?! (?:least|most))|have|be|becomes?|obtain|obtained|yields?|find|found|answer|result|solution|value|total|thus|therefore|so|hence|conclude|choose|pick|option|simplifies to|reduces to|equal to|then|it's|that's|leaving)\b[:,]?|:|=|⇒|→)\s+",
    re.IGNORECASE,
)
_CUT = re.compile(
    r"\.\s|[,;]\s(?=(?:and )?(?!and\b|or\b)[a-z]{2,}\b)|\s(?=or (?:more|less|greater|fewer|larger|smaller|higher|lower|above|below)\b)|\s(?:long|wide|tall|high|deep|away|apart|left|altogether|old|each|remaining|in (?:total|all|\d+ (?:day|week|month|year|hour|minute)s?))\b|\s(?:because|since|where|which|when|as|after|with|that|by|if|assuming|provided)\b|\n| \(|\s(?:is|are) (?:the|our|my)\b",
)


def spoken_answer(text: str, *, words: bool = False, numeric: bool = False) -> str | None:
    r"""The answer of a text that marks none: the whole text if it is a formula, else its last `$...$`, else what its last sentence ends with.

    The last sentence goes first where it comes after the last `$...$` and has numbers. words: the answer can be words, in which case the
    last of a sentence are taken for it. numeric: it is a number, so that None is better than a formula before such a sentence.

    Example: spoken_answer("We add them, so x = 3/4.") -> "x = 3/4"
    """
    text = _without_coda(text[-8000:]).strip()
    whole = reading(text) if len(text) <= 600 else None
    if whole is not None and (whole.formula or whole.choice):
        return text
    segments, after = _last_segments(text[-4000:], numeric=numeric)
    if segments is not None and not re.search(r"\d", after):
        return segments
    last = _SENTENCE_END.split(text[-600:].rstrip().rsplit("\n", 1)[-1])[-1]
    if segments is None and not re.search(r"\d", last):
        last = text[-600:].rstrip().rsplit("\n", 1)[-1]
    tails = list(reversed(list(_TAIL.finditer(last))))[:MAX_TAILS]
    for tail in tails:  # all of "x = 2 and y = 3", rather than the 3
        if tail[0][0].isalpha() and reading(last[tail.end() :]).formula:
            return last[tail.end() :]
    ends = [last[m.end() :] for m in tails]
    for short in [False, True] if words else [False]:
        for end in ends:
            if (found := first_answer(end, words=short)) is not None:
                return found
    if (found := first_answer(last)) is not None:
        return found
    if (found := _last_formula(last)) is not None or (segments is not None and not numeric):
        return found or segments
    return text if words and whole is not None and whole.words is not None else None


def _without_coda(text: str) -> str:
    """The text before a special token, before a last "I hope it is correct." and before ", attained at x = 2."."""
    text = _ASY.sub("", _SPECIAL.split(text, maxsplit=1)[0]).rstrip()
    if (where := _ATTAINED.search(text, max(0, len(text) - 120))) is not None:
        text = text[: where.start()]
    while (found := _HOPE.search(text, max(0, len(text) - 60))) is not None:
        text = text[: found.start()].rstrip()
    return text


def last_sentence(text: str) -> str:
    """The last sentence of a text's last line."""
    return _SENTENCE_END.split(text[-600:].strip().rsplit("\n", 1)[-1])[-1]


def computed_number(text: str) -> str | None:
    """What the last sentence computes, with its unit: of "she has 20 - 15 = $5 for 3 days" the $5; None where it goes on to say more."""
    sentence = last_sentence(text)
    found = list(_COMPUTED.finditer(sentence))
    if not found or _GOES_ON.search(sentence, found[-1].end()):
        return None
    return found[-1][1] + unit_at(sentence, found[-1].end())


def last_number_and_unit(text: str) -> str | None:
    """The last plain number in the text, with a known unit where one follows it."""
    number = last_number(text)
    if number is None:
        return None
    start = text.rfind(number)
    if _IN_TIME.search(text, max(0, start - 40), start) and _TIME_UNIT.match(text, start + len(number)):
        # "407 papers in 11 hours": the number before, if the sentence has one
        earlier = last_number(text[_sentence_start(text, start) : start])
        if earlier is not None:
            number, start = earlier, text.rfind(earlier, 0, start)
    return number + unit_at(text, start + len(number))


def _sentence_start(text: str, before: int) -> int:
    """Where the sentence begins that the character before `before` is in."""
    return max(
        (m.end() for m in _SENTENCE_END.finditer(text, max(0, before - 400), before)),
        default=text.rfind("\n", 0, before) + 1,
    )


def choice_in(text: str) -> str | None:
    """The last capital letter from A to J that stands for a choice in a text; "A" and "I" as words are none, nor is what was not taken."""
    text = text[-2000:]
    letters = [
        m[1] or m[2]
        for m in _LETTER.finditer(text)
        if not denied(text, m.start()) and not _INSTEAD.search(text, max(0, m.start() - 30), m.start())
    ]
    return letters[-1] if letters else None


def ends_with_words(text: str, words: str) -> bool:
    """Whether the last sentence ends with these words, and denies nothing."""
    plain = re.sub(r"[\s.,!*\"]+", " ", text[-600:].strip().rsplit("\n", 1)[-1]).strip().lower()
    sentence = re.split(r"[.!?]\s", text[-600:].strip())[-1].rstrip(' .!*"$}')
    before = sentence[: max(0, len(sentence) - len(words))]
    return plain.endswith(" " + words) and not _DENIAL.search(before) and not _OPTION.search(before)


def marked_sentence(text: str, *, words: bool = False) -> tuple[str | None, str]:
    """The answer in what follows "Answer:", and the first sentence of that, in which it is looked for."""
    text = _ADVERB.sub("", text)
    sentence = _SENTENCE_END.split(text, maxsplit=1)[0]
    found = first_answer(text, words=words, near=3) or spoken_answer(sentence, words=words)
    return found or first_answer(text, words=words), sentence


def _last_formula(line: str) -> str | None:
    """The formula that a line ends with, after a word: of "we obtain the probability 1/2" the end."""
    starts = [m.end() for m in re.finditer(r"(?:(?<=[A-Za-z]{2})|i\.e\.)[:,]? +", line)][-10:]
    for start in starts:
        end = line[start:].rstrip(" .")
        if _IN_TIME.search(line[:start]) and re.search(_TIME_UNIT.pattern, end):
            break  # "in 3 hours" says when
        if re.search(r"[\\=^{}*+]", line[:start]) or line[start] in "+*/=^<>":
            break  # inside a formula
        if re.search(r"\d", end) and not re.match(r"[a-z]{2,} ", end) and reading(end).formula:
            return end
    return None


def _inside(segment: re.Match[str]) -> str:
    """What a segment holds; of several aligned lines the last."""
    inside = next(g for g in segment.groups() if g is not None)
    if (lines := _LINES.search(inside)) is None:
        return inside
    last = [line for line in re.split(r"\\\\", lines[2]) if line.strip()][-1:]
    return re.sub(r"^\s*=|[.,\s]*$", "", last[0].replace("&", "")) if last else inside


def _first_segments(text: str, near: int) -> str | None:
    r"""The first `$...$`, where it begins within `near` characters, with those that only commas, "and" or "or" part from it."""
    out: list[str] = []
    end = -1
    for segment in _SEGMENT.finditer(text):
        if segment.start() >= near if not out else not _JOIN.fullmatch(text, end, segment.start()):
            break
        out.append(_inside(segment))
        end = segment.end()
    return ", ".join(out) if out else None


def _last_segments(text: str, *, numeric: bool = False) -> tuple[str | None, str]:
    r"""The last `$...$` of a text, with those that only commas, "and" or "or" part from it; and the text after them.

    numeric: a last one that is a name is left out, as in "$12$ is the value of $k$".
    """
    out: list[str] = []
    start, end = -1, 0
    for segment in reversed(list(_SEGMENT.finditer(text))):
        if numeric and not out and re.fullmatch(r"\s*[A-Za-z][.,]?\s*", _inside(segment)):
            continue
        if out and not _JOIN.fullmatch(text, segment.end(), start):
            break
        end = end or segment.end()
        out.insert(0, _inside(segment))
        start = segment.start()
    return (", ".join(out) if out else None), text[end:]


def first_answer(line: str, *, words: bool = False, near: int = 30) -> str | None:
    r"""What a line begins with: all of it if it reads, its first `$...$` within `near` characters, or what comes before the first clause of words; None otherwise."""
    line = line.strip().rstrip(".")
    if len(line) > MAX_CHARACTERS:
        return None
    now = reading(line)
    if now.formula or now.choice or (words and now.words and len(now.words.split()) <= 3):
        return line
    boxed = last_boxed(line)
    if boxed is not None:
        return boxed
    if (segments := _first_segments(line, near)) is not None:
        return segments
    cut = _CUT.search(line)
    if cut is not None and cut.start():
        head = reading(line[: cut.start()].strip())
        if head.formula or head.choice or number_with_unit(head.text) is not None:
            return head.text
    return None
