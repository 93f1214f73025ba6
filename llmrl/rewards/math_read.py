r"""What an answer says: found in prose, freed of its unit, and parsed; or a word, or the letter of a choice."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from llmrl.rewards.answer import last_boxed, number_with_unit, unwrap
from llmrl.rewards.math_clean import EMPTY, ascii_form, clean, split_unit
from llmrl.rewards.math_parse import MAX_CHARACTERS, Node, NotRead, parse

_CHOICE = re.compile(r"\(\s*([A-Ja-j])\s*\)\.?|([A-J])\s*[.):]?")
_CHOICE_FIRST = re.compile(r"(?:\(\s*([A-J])\s*\)|([A-J])\s*[.):])\s+\S")
_STYLE = re.compile(r"\\(?:text(?:bf|it|rm|tt)?|math(?:rm|bf|sf|it|tt)|mbox|boldsymbol|operatorname) *\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'’ ,.\n-]*")
_SHORT_WORDS = {"yes", "no", "true", "false", "odd", "even", "dne", "none", "red", "blue", "mon", "tue", "one", "two", "six", "ten", "all", "both", "first"}  # fmt: skip
_FORMULA_WORDS = re.compile(
    r"arc(?:sin|cos|tan|cot)h?|sinh|cosh|tanh|sqrt|cbrt|floor|ceil|binom|factorial|[iI]nfinity|union|theta|alpha|beta|gamma|delta|epsilon|lambda|omega|sigma|kappa|zeta"
    r"|sin|cos|tan|cot|sec|csc|log|exp|abs|max|min|gcd|lcm|det|phi|rho|tau|psi|inf|pi|ln|or|and|in|oo"
)
_NOT_THERE = {"dne", "does not exist", "doesn't exist", "the limit does not exist", "limit does not exist"}
_REALS = {"all real numbers", "all reals", "real numbers", "the real numbers", "all real x", "all real values"}
_TIME = re.compile(r"(\d{1,2}:\d{2})\s*([ap])\.?\s?m\.?", re.IGNORECASE)
_UNDEFINED = {"undefined", "not defined", "is undefined"}
MAX_TAILS = 8
_JOIN = re.compile(r"[\s,;]*(?:and|or)?[\s,;]*")
_SEGMENT = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_TAIL = re.compile(
    r"(?:\b(?:is|are|equals?|get|gets|gives?|have|be|becomes?|obtain|obtained|yields?|find|found|answer|result|solution|value|total|thus|therefore|so|hence|conclude|choose|pick|option|simplifies to|reduces to|equal to|then)\b[:,]?|:|=|⇒|→)\s+",
    re.IGNORECASE,
)
_CUT = re.compile(
    r"\.\s|[,;]\s(?=(?:and )?(?!and\b|or\b)[a-z]{2,}\b)|\s(?:because|since|where|which|when|as|after|with|that|by|if|assuming|provided)\b|\n| \(|\s(?:is|are) (?:the|our|my)\b",
)


@dataclass(frozen=True)
class Reading:
    """An answer as it was understood. `whole`: parsed as it stands (with two readings of "1,234"); `bare`: parsed without its unit."""

    text: str
    whole: tuple[Node, ...] = ()
    bare: tuple[Node, ...] = ()
    unit: tuple[str, Fraction] | None = None
    words: str | None = None
    choice: str | None = None

    @property
    def read(self) -> bool:
        return self.formula or self.words is not None or self.choice is not None

    @property
    def formula(self) -> bool:
        return bool(self.whole or self.bare)


@functools.lru_cache(maxsize=1 << 14)
def reading(text: str) -> Reading:
    """Reads one answer, out of which no search is needed any more. Never raises; `read` says whether it was understood."""
    text = unwrap(text)
    if len(text) > MAX_CHARACTERS:
        return Reading(text)
    choice = choice_letter(text)
    words = plain_words(text)
    if words is not None:
        if words in _REALS:
            return Reading(text, whole=(("all", "R"),), words=words)
        if words in EMPTY:
            return Reading(text, whole=(("empty",),), words=words)
        return Reading(
            text, words="dne" if words in _NOT_THERE else "undefined" if words in _UNDEFINED else words, choice=choice
        )
    if time := _TIME.fullmatch(re.sub(r"\\ |~", " ", _STYLE.sub(r" \1 ", text)).strip()):
        return Reading(text, words=f"{time[1]} {time[2]}m".lower())
    body, unit = split_unit(ascii_form(text))
    whole = _trees(text)
    bare = _trees(body) if body != ascii_form(text) else whole
    if not whole and not bare and number_with_unit(text) is None:
        return Reading(text, words=_mixed_words(text), choice=choice)
    return Reading(text, whole, bare, unit, None, choice)


def _trees(text: str) -> tuple[Node, ...]:
    cleaned = clean(text).rstrip(" .,;")
    out: list[Node] = []
    for thousands in (True, False):
        try:
            tree = parse(cleaned, thousands=thousands)
        except NotRead:
            continue
        except RecursionError:
            return ()
        if tree not in out:
            out.append(tree)
        if not re.search(r"\d,\d{3}(?!\d)", cleaned):
            break
    return tuple(out)


def choice_letter(text: str) -> str | None:
    r"""The letter of "B", "(B)", "B.", r"\textbf{(B)}"; also of "(B) 12" and "B. twelve". None for all else."""
    plain = _STYLE.sub(r"\1", text).replace("$", "").replace("~", " ").strip(" *")
    plain = re.sub(r"^(?:option|choice)\s+", "", plain, flags=re.IGNORECASE)
    found = _CHOICE.fullmatch(plain) or _CHOICE_FIRST.match(plain.replace("\\", " "))
    return None if found is None else (found[1] or found[2]).upper()


def plain_words(text: str) -> str | None:
    """The words of an answer in words, lower case, without styles and punctuation; None for formulas."""
    plain = re.sub(r"\\[ ,;:!]|~|\s+", " ", _STYLE.sub(r" \1 ", text)).replace("$", "").strip(" .!*\"'")
    if not _WORDS.fullmatch(plain) or len(plain) > 300:
        return None
    runs = re.findall(r"[A-Za-z]+", plain)
    odd = [r for r in runs if len(r) > 1 and not re.fullmatch(rf"(?:(?:{_FORMULA_WORDS.pattern})[A-Za-z]?)*", r)]
    if (
        any(len(r) >= 4 for r in odd)
        or any(r.lower() in _SHORT_WORDS for r in runs)
        or len([r for r in odd if len(r) >= 3]) >= 2
    ):
        return re.sub(r"\s+", " ", re.sub(r"[,.]", " ", plain)).strip().lower()
    return None


def _mixed_words(text: str) -> str | None:
    """Words with numbers among them, such as "Group 2" and "9:45 a.m.", which only the same words equal."""
    plain = re.sub(r"\\ |~", " ", _STYLE.sub(r" \1 ", text))
    if len(plain) > 300 or re.search(r"[\\^_{}$=<>|]", plain) or not re.search(r"[A-Za-z]{4,}|[ap]\.?m\b", plain):
        return None
    return re.sub(r"[\s.,]+", " ", plain).strip().lower()


def spoken_answer(text: str, *, words: bool = False) -> str | None:
    r"""The answer of a text that marks none: the whole text if it is a formula, else its last `$...$`, else what its last sentence ends with.

    words: the answer can be words, in which case the last of a sentence are taken for it.

    Example: spoken_answer("We add them, so x = 3/4.") -> "x = 3/4"
    """
    text = text.strip()
    whole = reading(text) if len(text) <= 600 else None
    if whole is not None and (whole.formula or whole.choice):
        return text
    if (segments := _last_segments(text[-4000:])) is not None:
        return segments
    last = text[-600:].rstrip().rsplit("\n", 1)[-1]
    ends = [last[m.end() :] for m in reversed(list(_TAIL.finditer(last)))][:MAX_TAILS]
    for short in [False, True] if words else [False]:
        for end in ends:
            if (found := first_answer(end, words=short)) is not None:
                return found
    if (found := first_answer(last)) is not None:
        return found
    return text if words and whole is not None and whole.words is not None else None


def _last_segments(text: str) -> str | None:
    r"""The last `$...$` of a text, with those that only commas, "and" or "or" part from it."""
    out: list[str] = []
    start = -1
    for segment in reversed(list(_SEGMENT.finditer(text))):
        if out and not _JOIN.fullmatch(text, segment.end(), start):
            break
        out.insert(0, next(g for g in segment.groups() if g is not None))
        start = segment.start()
    return ", ".join(out) if out else None


def first_answer(line: str, *, words: bool = False) -> str | None:
    r"""What a line begins with: all of it if it reads, its first `$...$`, or what comes before the first clause of words; None otherwise."""
    line = line.strip().rstrip(".")
    if len(line) > MAX_CHARACTERS:
        return None
    now = reading(line)
    if now.formula or now.choice or (words and now.words and len(now.words.split()) <= 3):
        return line
    boxed = last_boxed(line)
    if boxed is not None:
        return boxed
    segment = _SEGMENT.search(line)
    if segment is not None and segment.start() < 30:
        return next(g for g in segment.groups() if g is not None)
    cut = _CUT.search(line)
    if cut is not None and cut.start():
        head = reading(line[: cut.start()].strip())
        if head.formula or head.choice:
            return head.text
    return None
