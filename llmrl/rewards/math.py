r"""The math verifier: does the final answer equal the reference, as mathematics?

Texts and exact numbers are compared first, then parsed answers by their values (`math_equal`). What our parser does not read goes to
math-verify. Its own time limits (signals, which fail outside the main thread) are off: the runner kills a worker that is late. Numbers
too large to be an answer are refused before anything would try to compute them.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction
from typing import Any

from llmrl.errors import DataError
from llmrl.functional.boxed import BOX, braced
from llmrl.rewards.answer import (
    all_boxed,
    final_answer,
    gold_answer,
    last_number,
    number_of,
    number_with_unit,
    same_text,
    unwrap,
)
from llmrl.rewards.base import row_verifier, wrong
from llmrl.rewards.math_chain import whole_number
from llmrl.rewards.math_clean import EMPTY
from llmrl.rewards.math_equal import equal
from llmrl.rewards.math_names import is_word
from llmrl.rewards.math_near import near
from llmrl.rewards.math_parse import Node
from llmrl.rewards.math_prose import (
    choice_in,
    computed_number,
    ends_with_words,
    first_answer,
    last_number_and_unit,
    last_sentence,
    marked_sentence,
    spoken_answer,
)
from llmrl.rewards.math_read import Reading, reading
from llmrl.rewards.math_said import (
    asked_about,
    between,
    denied,
    plain,
    qualified,
    rejected,
    without_questions,
    without_reason,
    yes_or_no,
)
from llmrl.rewards.math_words import spoken_number

# An answer may be this much longer than its reference; longer ones are no final answers, and slow to parse.
EXTRA_CHARACTERS = 500
_FINAL = re.compile(r"final answer(?: is)?:? ", re.IGNORECASE)
_WORD = re.compile(
    r"(?<![A-Za-z])(?!arc|sinh|cosh|tanh|sqrt|alpha|beta|gamma|delta|theta|lambda|omega|sigma|pmatrix|bmatrix|matrix|cases|array|aligned)[A-Za-z]{4,}(?![A-Za-z])"
)
_CHOICE_NAMED = re.compile(r"\(?[A-J][).:]+ +(?=\S)")
_ENDLESS = re.compile(r"\\[cldv]?dots(?![A-Za-z])|\.\.\.|…")
_SENTENCE = re.compile(r"[A-Za-z]{2,}[,.]? +[A-Za-z]{2,}")
_DECIMAL_COMMA = re.compile(r"[-+]?(?:\d+,(?:\d{1,2}|\d{4,})|0,\d+)")


def check_gold(*, column: str | None = None, tolerance: str | None = None, **columns: Any) -> str | None:
    """Why the row's reference answer can't be verified against, or None."""
    allowed = columns.get(tolerance) if tolerance else None
    if allowed is not None and not (isinstance(allowed, int | float) and allowed >= 0):
        return f"the tolerance (column {tolerance!r}) must be a number from 0, given {allowed!r}"
    try:
        gold = _gold(columns, column)
    except DataError as error:
        return str(error)
    if number_with_unit(gold) is not None or reading(gold).read:
        return None
    parsed = _parse_gold(gold)
    if not parsed:
        return f"neither llmrl nor math-verify can parse the reference answer {gold[:80]!r}"
    return (
        None if _equal(parsed, parsed) else f"the reference answer {gold[:80]!r} does not equal itself for math-verify"
    )


def _warm_up() -> None:
    _parse(r"\frac{1}{2}")
    equivalent(r"\sqrt{2}", r"\sqrt{3}")


def read_answer(completion: str, *, column: str | None = None, **columns: Any) -> str | None:
    r"""The final answer of a completion as `math_answer` reads it, whatever its value; None where there is none. Compares nothing.

    Several boxes are one list where the reference is a list and the last box alone is none.
    Example: read_answer(r"so \boxed{\frac{2}{4}}", answer="0.5") -> r"\frac{2}{4}"
    """
    try:
        gold = _gold(columns, column)
    except DataError:
        return final_answer(completion, numeric=False)
    if len(completion) < len(gold) + EXTRA_CHARACTERS and same_text(completion, gold):
        return completion.strip()
    answer = _answer(completion, gold)
    if answer is not None and _is_list(gold) and not _is_list(answer):
        boxes = all_boxed(completion) or []
        return ", ".join(boxes) if len(boxes) > 1 else answer
    return answer


def _check_args(*, rel_tol: Any = 0.0, **_: Any) -> str | None:
    fine = isinstance(rel_tol, int | float) and rel_tol >= 0
    return None if fine else f"rel_tol must be a number from 0, given {rel_tol!r}"


def _is_list(answer: str) -> bool:
    trees = reading(answer).whole
    return bool(trees) and trees[0][0] in ("seq", "set", "or", "and")


@row_verifier(check_gold=check_gold, warm_up=_warm_up, read_answer=read_answer, check_args=_check_args)
def math_answer(
    completion: str, *, column: str | None = None, rel_tol: float = 0.0, tolerance: str | None = None, **columns: Any
) -> float | None:
    r"""1.0 when the final answer equals the reference as mathematics, else 0.0; None when the row has no usable reference.

    The final answer is the last closed `\boxed{}` (several joined by commas or "and" are a set), `<answer></answer>`, or what follows
    "Answer:" or "####"; else the whole text if it is a formula, its last `$...$`, what its last sentence ends with, and for a numeric
    reference the last number. `column`: where the reference is; default `answer`, else `solution`, of which the last `\boxed{}` or
    what follows "####" counts. Numbers may differ by `rel_tol` of the reference, and by what the row's column `tolerance` holds.

    Example: math_answer.score(r"so \boxed{\frac{2}{4}}", answer="0.5") -> 1.0
    """
    try:
        gold = _gold(columns, column)
    except DataError:
        return None
    if len(completion) < len(gold) + EXTRA_CHARACTERS and same_text(completion, gold):
        return 1.0
    answer = _answer(completion, gold)
    if answer is None:
        return wrong(None, gold)
    verdict = equivalent(gold, answer)
    if verdict is False and _is_list(gold) and len(boxes := all_boxed(completion) or []) > 1:
        # Several boxes are a set, wherever they stand; one box among others is no hedge, since only the last is the answer.
        verdict = equivalent(gold, ", ".join(boxes))
    absolute = float(columns.get(tolerance) or 0) if tolerance else 0.0
    if not verdict and (rel_tol or absolute):
        verdict = near(gold, answer, relative=rel_tol, absolute=absolute) or verdict
    return None if verdict is None else 1.0 if verdict else wrong(answer, gold)


def _gold(columns: dict[str, Any], column: str | None) -> str:
    gold = gold_answer(columns, column)
    if number_of(gold) is not None or reading(gold).read:
        return gold
    if len(re.findall(r"[A-Za-z]{2,}", gold)) >= 3 and (found := spoken_answer(gold)) is not None:
        return found
    return gold


def _answer(completion: str, gold: str) -> str | None:
    """The final answer of a completion as a text that can be read, where there is one."""
    thoughts, _, said = completion.rpartition("</think>")
    if thoughts and re.search(r"\w", said):
        completion = said  # what was boxed in thoughts was not said
    completion = plain(completion)
    ours = reading(gold)
    marked = final_answer(completion, numeric=False)
    if marked is not None and "boxed" not in completion and asked_about(completion, completion.rfind(marked)):
        return None
    if marked is not None and same_text(marked, gold) and not _box_rejected(completion):
        return marked
    if marked is not None and "boxed" in completion:
        return _boxed_answer(completion, marked, words=ours.words is not None)
    if marked is not None:
        return _marked_answer(marked, ours, numeric=_is_number(gold))
    if r"\boxed" in completion or r"\fbox" in completion:
        return None  # cut off inside its box
    return _unmarked_answer(without_reason(without_questions(completion)), gold, ours)


def _boxed_answer(completion: str, marked: str, *, words: bool) -> str | None:
    if (later := _after_boxes(completion)) is not None:
        return later
    if _box_rejected(completion):
        return None
    if number_of(marked) is not None or len(marked) > 600 or reading(marked).formula:
        return marked
    # "The answer is 10" inside a box; what is merely long or odd stays what it is.
    inside = re.sub(r"\\text *\{([^{}]*)\}", r"\1", marked)
    found = None if words else between(inside) or spoken_answer(inside)
    return (qualified(inside, found) or marked) if found else marked


def _box_rejected(completion: str) -> bool:
    r"""Whether the last box is said to be wrong: "\boxed{72} is too large"."""
    boxes = list(BOX.finditer(completion))
    if not boxes or (opening := completion.find("{", boxes[-1].end())) < 0:
        return False
    content = braced(completion, opening, len(completion))
    return denied(completion, boxes[-1].start()) or (
        content is not None and rejected(completion, opening + len(content) + 2)
    )


def _marked_answer(marked: str, ours: Reading, *, numeric: bool) -> str | None:
    r"""The answer in what follows "Answer:", or is inside `<answer>`."""
    words = ours.words is not None
    if (
        number_with_unit(marked) is not None
        or reading(marked).formula
        or (words and reading(marked).words == ours.words)
    ):
        return marked
    found, sentence = marked_sentence(marked, words=words)
    if found is None and numeric and re.search("[A-Za-z]", sentence):
        found = last_number(sentence) or spoken_number(sentence)
    if found is None or words:
        return between(sentence) or found or marked
    return qualified(marked, found, first=True)


def _unmarked_answer(completion: str, gold: str, ours: Reading) -> str | None:
    """What a text that marks no answer ends with."""
    words, numeric = ours.words is not None, _is_number(gold)
    if words and ours.words:
        if ours.words in ("yes", "no", "true", "false") and (polar := yes_or_no(completion)) is not None:
            return polar
        same = EMPTY if ours.words in EMPTY else (ours.words,)
        if any(ends_with_words(completion, w) for w in same):
            return ours.words
    found = (computed_number(completion) if numeric else None) or spoken_answer(
        completion, words=words, numeric=numeric
    )
    if found is None and ours.choice is not None:
        found = choice_in(completion)
    if found is None and numeric and not re.search(r"\d", last := last_sentence(completion)):
        found = spoken_number(last)
    if found is None:
        found = (None if words else between(completion)) or (last_number_and_unit(completion) if numeric else None)
    if found is None and len(completion) < 200 and _with_names(gold, completion) is not None:
        found = completion.strip()
    return None if found is None else found if words else qualified(completion, found)


@functools.lru_cache(maxsize=1 << 12)
def _is_number(gold: str) -> bool:
    """Whether the reference is a number and its unit, or a formula such as 2^{10} whose value is a whole number."""
    if number_with_unit(gold) is not None:
        return True
    trees = reading(gold).whole
    return len(trees) == 1 and whole_number(trees[0])


def _after_boxes(completion: str) -> str | None:
    """What "Final answer: ..." after the last box says, where it says a formula: that is the last word."""
    found = list(_FINAL.finditer(completion, completion.rfind("boxed{") + 1))
    if not found:
        return None
    line = completion[found[-1].end() :].lstrip().split("\n", 1)[0]
    answer = first_answer(line, near=3)
    return answer if answer is not None and reading(answer).formula else None


def equivalent(gold: str, answer: str) -> bool | None:
    """Whether an answer that has been extracted equals the reference; None when the reference can't be read. Not symmetric: see `docs`."""
    if same_text(answer, gold):
        return True
    numbers = number_of(gold), number_of(answer)
    if numbers[0] is not None and numbers[1] is not None:
        if len({sign for sign in "$€£" if sign in unwrap(gold) + unwrap(answer)}) > 1:
            return False
        return numbers[0] == numbers[1] or _same_decimals(numbers[0], numbers[1], gold, answer)
    if _decimal_comma(gold, answer) or _decimal_comma(answer, gold):
        return True
    if len(answer) > len(gold) + EXTRA_CHARACTERS:
        return False
    ours, theirs = reading(gold), reading(answer)
    verdict = _read_equal(ours, theirs)
    if (
        verdict is not True
        and theirs.choice
        and ours.formula
        and not ours.choice
        and (named := _CHOICE_NAMED.match(theirs.text))
    ):
        return equivalent(gold, theirs.text[named.end() :])  # (B) 17
    if verdict is not None:
        return verdict
    scaled = number_with_unit(gold), number_with_unit(answer)
    if scaled[0] is not None and scaled[1] is not None:
        return scaled[0] == scaled[1]
    if scaled[1] is not None and ours.whole and ours.unit is None:  # 1024 subsets for 2^{10}
        return any(equal(tree, ("num", scaled[1], None)) is True for tree in ours.whole)
    if (texts := _with_names(gold, answer)) is not None and _read_equal(*map(reading, texts)) is True:
        return True
    if _ENDLESS.search(gold) or _ENDLESS.search(answer) or (ours.read and _is_prose(answer)):
        return False  # math-verify would compare a part of it
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        return False if ours.read else None
    if _is_prose(gold):
        return False  # of a sentence math-verify would compare some formula
    return verify_parsed(parsed_gold, answer)


def _decimal_comma(written: str, other: str) -> bool:
    """1,22 for 1.22, where the other side says that it is no list."""
    text = unwrap(written)
    return (
        "." in other
        and _DECIMAL_COMMA.fullmatch(text) is not None
        and number_of(text.replace(",", ".")) == number_of(other)
    )


def _with_names(gold: str, answer: str) -> list[str] | None:
    """Both texts with words such as "mass" in 2*mass as names, where the same words stand in both and none follows another."""
    texts = [gold, answer]
    words = {w for w in _WORD.findall(gold) if is_word(w)}
    if not words or any(
        _SENTENCE.search(t) or "\\" in t or {w for w in _WORD.findall(t) if is_word(w)} != words for t in texts
    ):
        return None
    return [_WORD.sub(lambda m: rf"\aleph_{{{m[0]}}}" if m[0] in words else m[0], t) for t in texts]


def _is_prose(text: str) -> bool:
    """Whether words of a sentence are in the text, apart from the names of commands and functions."""
    return len(_WORD.findall(re.sub(r"\\[A-Za-z]+", " ", text))) >= 2


def _same_decimals(gold: Fraction, answer: Fraction, *texts: str) -> bool:
    """Floating point noise: 0.30000000000000004 is 0.3."""
    return any("." in t for t in texts) and abs(gold - answer) <= abs(gold) / 10**9


def _read_equal(gold: Reading, answer: Reading) -> bool | None:
    """The verdict on two readings; None where one was not understood, or where they can only be compared symbolically."""
    if gold.choice is not None and answer.choice is not None:
        return gold.choice == answer.choice and _same_content(gold.text, answer.text)
    if (
        gold.choice is not None
        and gold.choice in "ABCD"
        and gold.text == gold.choice
        and answer.text == gold.choice.lower()
    ):
        return True
    if gold.words is not None or answer.words is not None:
        if gold.words is not None and answer.words is not None and not (gold.whole and answer.whole):
            return gold.words == answer.words
        if not (gold.formula and answer.formula):
            return False if gold.read and answer.read else None
    if not ((gold.whole or gold.bare) and (answer.whole or answer.bare)):
        return None
    verdicts = [equal(g, a) for g in gold.whole for a in answer.whole]
    if True in verdicts:
        return True
    if gold.bare is not gold.whole or answer.bare is not answer.whole:
        verdicts += [_unit_equal(gold, g, answer, a) for g in gold.bare for a in answer.bare]
    return True if True in verdicts else None if None in verdicts or not verdicts else False


def _same_content(gold: str, answer: str) -> bool:
    """Whether what stands after the letters of two choices, "B: 3x" and "(B) 3x", does not differ."""
    named = _CHOICE_NAMED.match(gold), _CHOICE_NAMED.match(answer)
    if named[0] is None or named[1] is None:
        return True
    return equivalent(gold[named[0].end() :], answer[named[1].end() :]) is not False


def _unit_equal(gold: Reading, gold_tree: Node, answer: Reading, answer_tree: Node) -> bool | None:
    """Units count when both sides name one: then they must measure the same, and 1 m is 100 cm."""
    if gold.unit is not None and answer.unit is not None:
        if gold.unit[0] != answer.unit[0]:
            return False
        if gold.unit[1] != answer.unit[1]:
            gold_tree, answer_tree = _times(gold_tree, gold.unit[1]), _times(answer_tree, answer.unit[1])
    return equal(gold_tree, answer_tree)


def _times(node: Node, factor: Fraction) -> Node:
    """The node in the unit that is a factor smaller: of "v = 36" the 36."""
    if node[0] == "rel" and set(node[2]) == {"="}:
        return (*node[:1], (*node[1][:-1], _times(node[1][-1], factor)), node[2])
    return ("mul", node, ("num", factor, None))


def verify_parsed(gold: list[Any], answer: str) -> bool:
    """Whether `answer` equals the parsed reference. Raises MemoryError; every other failure to compare means that it does not."""
    from llmrl.rewards.math_guard import too_large_expression, too_large_text

    if too_large_text(answer):
        return False
    parsed = _parse(answer)
    if not parsed or too_large_expression(parsed[0]):
        return False
    return _equal(gold, parsed)


@functools.lru_cache(maxsize=1 << 16)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(gold)


def _parse(answer: str) -> list[Any]:
    """[expression, normalised text], or [text], or []: what math-verify makes of an answer that has been extracted already."""
    from math_verify import LatexExtractionConfig, parse

    _quiet()
    answer = re.sub(r"(?<=\d),?\\[!,](?=\d{3})|^\\approx", "", answer)
    # math-verify takes a letter after a space for a unit: of "a + b + c" it would keep "a +".
    answer = re.sub(r"(?<=[-+=*/^]) +| +(?=[-+=*/^])", "", answer)
    found = parse(f"\\boxed{{{answer}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
    # Only text came back: the answer could not be read as LaTeX. Comparing texts has been done before, more leniently.
    return found if found and not isinstance(found[0], str) else []


def _equal(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    try:
        return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception as error:
        # Comparing a matrix with an inequality, say: math-verify raises, and the two are not equal.
        logging.getLogger("llmrl.rewards").debug("not comparable: %s", error)
        return False


@functools.cache
def _quiet() -> None:
    # math-verify warns that its limits are off. They are meant to be.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
