"""Whether two answers are numbers that differ by no more than a tolerance, for references that were computed to a few digits."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from llmrl.rewards.answer import number_with_unit
from llmrl.rewards.math_parse import Node
from llmrl.rewards.math_read import Reading, reading
from llmrl.rewards.math_value import NoValue, Point, context, evaluate, symbols


def near(gold: str, answer: str, *, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether both are real numbers (formulas without symbols, units as `equivalent` has them), and
    |answer - gold| <= max(relative x |gold|, absolute). Of a collection, an interval or an equation: False.

    Example: near("4.5e33", r"4.5002 \\times 10^{33}", relative=1e-4) -> True
    """
    mp = context()
    ours, theirs = reading(gold), reading(answer)
    for g, a in _pairs(gold, ours, answer, theirs):
        if abs(a - g) <= max(mp.mpf(relative) * abs(g), mp.mpf(absolute)):
            return True
    return False


def _pairs(gold: str, ours: Reading, answer: str, theirs: Reading) -> Iterator[tuple[Any, Any]]:
    plain = number_with_unit(gold), number_with_unit(answer)
    if plain[0] is not None and plain[1] is not None and (ours.unit is None or theirs.unit is None):
        yield _real(plain[0]), _real(plain[1])
    scale = Fraction(1)
    if ours.unit is not None and theirs.unit is not None:
        if ours.unit[0] != theirs.unit[0]:
            return
        scale = theirs.unit[1] / ours.unit[1]
    for g in ours.bare or ours.whole:
        for a in theirs.bare or theirs.whole:
            if (g[0] == "pct") != (a[0] == "pct"):  # "4.2%" of a reference that says 4.2
                g, a = (tree[1] if tree[0] == "pct" else tree for tree in (g, a))
            values = _number(g), _number(a)
            if values[0] is not None and values[1] is not None:
                yield values[0], values[1] * _real(scale)


def _number(tree: Node) -> Any:
    """The tree's value, of "x = 5" the right side's; None where it is no real number."""
    if tree[0] == "rel" and tree[2] == ("=",) and tree[1][0][0] == "sym":
        tree = tree[1][1]
    if tree[0] in ("set", "seq", "tuple") or symbols(tree):
        return None
    try:
        value = evaluate(tree, Point(0))
    except NoValue:
        return None
    real = _real(value)
    return None if context().im(real) != 0 or not context().isfinite(real) else context().re(real)


def _real(value: Any) -> Any:
    mp = context()
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction | int) else mp.mpmathify(value)
