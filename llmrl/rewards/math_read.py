r"""What an answer says: freed of its unit, and parsed; or a word, or the letter of a choice."""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from llmrl.rewards.answer import number_with_unit, unwrap
from llmrl.rewards.math_clean import EMPTY, ascii_form, clean, split_unit
from llmrl.rewards.math_parse import MAX_CHARACTERS, Node, NotRead, parse
from llmrl.rewards.math_words import number_in_words, time_of_day

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
_SPECIAL = re.compile(r"(?:[gG]amma|zeta|beta) ?\(|(?<![A-Za-z])n?[CP]r?\([^,()]+,[^,()]+\)")
_CHOOSE = re.compile(r"(?<![\w.])(\d{1,4}) ?C ?(\d{1,4})(?![\w.])")
_DIGIT_FACTOR = re.compile(r"([A-Za-z])\1(?=\d)")
_MONEY = re.compile(r"[-+]?\s*\\?(\$|€|£|euro|pounds)\s*[-+]?[\d,.]+")
_CURRENCIES = {"$": "money^1", "€": "euro^1", "euro": "euro^1", "£": "sterling^1", "pounds": "sterling^1"}
_UNDEFINED = {"undefined", "not defined", "is undefined"}


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
        if (number := number_in_words(words)) is not None:
            trees: tuple[Node, ...] = (("num", number, None),)
            return Reading(text, trees, trees, words=words)
        counted, _, unit_word = words.rpartition(" ")
        if (number := number_in_words(counted)) is not None and (known := split_unit(f"1 {unit_word}")[1]) is not None:
            return Reading(text, (), (("num", number, None),), known)
        return Reading(
            text, words="dne" if words in _NOT_THERE else "undefined" if words in _UNDEFINED else words, choice=choice
        )
    if time := time_of_day(re.sub(r"\\ |~", " ", _STYLE.sub(r" \1 ", text))):
        return Reading(text, whole=(("ratio", tuple(("num", Fraction(t), None) for t in time)),))
    if (money := _MONEY.fullmatch(text)) is not None:
        return Reading(text, (), _trees(text), (_CURRENCIES[money[1]], Fraction(1)))
    body, unit = split_unit(ascii_form(text))
    whole = _trees(text)
    bare = _trees(body) if body != ascii_form(text) else whole
    if not whole and not bare and number_with_unit(text) is None:
        return Reading(text, words=_mixed_words(text), choice=choice)
    return Reading(text, whole, bare, unit, None, choice)


def _trees(text: str) -> tuple[Node, ...]:
    cleaned = re.sub(r"[ ,;]*(?<!\.)\.?[ ,;]*$", "", clean(text))  # an ellipsis stays
    out: list[Node] = []
    ways: list[tuple[str, dict[str, bool]]] = [(cleaned, {})]
    # "1,234 and 500" are two numbers, and not three.
    if re.search(r"\d,\d{3}(?!\d)", cleaned) and not (
        re.search(r"\\l(?:or|and)(?![a-z])", cleaned) and not re.search(r",(?!\d{3}(?!\d))", cleaned)
    ):
        ways.append((cleaned, {"thousands": False}))
    if _SPECIAL.search(cleaned):
        ways.append((cleaned, {"special": True}))
    if "+-" in cleaned:
        ways.append((cleaned.replace("+-", r"\pm "), {}))
    if _CHOOSE.search(cleaned):
        ways.append((_CHOOSE.sub(r"\\binom{\1}{\2}", cleaned), {}))
    if "\\" not in cleaned and _DIGIT_FACTOR.search(cleaned):
        ways.append((_DIGIT_FACTOR.sub(r"\1*\1*", cleaned), {}))  # xx3, where x3 is read as a name first
    for way, options in ways:
        try:
            tree = parse(way, **options)
        except NotRead:
            continue
        except RecursionError:
            return ()
        if tree not in out:
            out.append(tree)
    if not out and 4 <= cleaned.count("|") <= 20:
        with contextlib.suppress(NotRead, RecursionError):
            out.append(parse(cleaned, nested=True))
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
