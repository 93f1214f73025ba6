r"""What is refused before sympy computes it: towers of powers, factorials and sums whose value no answer can have.

The bounds are on size alone, so that a refusal is a judgement (this is no final answer) and not a guess about running time.
What is within them and still slow is ended by the row's deadline.
"""

from __future__ import annotations

import math
import re
from typing import Any

MAX_DIGITS = 10_000
MAX_FACTORIAL = 2_000
MAX_TERMS = 10_000
MAX_POWER = 2_000  # exponent of something that is not a number: expanding it costs as many terms

MAX_NESTING = 12  # brackets in brackets: math-verify's time doubles with each

# Numbers joined by powers, each exponent opened after the sign: a^{b^{c}}, but not (a^b)^c.
_TOWER = re.compile(r"(?<![\d.])\d[\d.]*(?:\s*(?:\^|\*\*)[\s{(+-]*\d[\d.]*)+")
_FACTORIAL = re.compile(r"\d{5,}\s*[)}]?\s*!")


def too_large_text(answer: str) -> bool:
    """Deep nesting, and powers and factorials of plain numbers, found in the text: math-verify computes some while parsing (in calls).

    Example: too_large_text("9^{9^{9^9}}") and too_large_text("(9^{9^9}, 1)"); not too_large_text("2^{1000}")
    """
    return (
        bool(_FACTORIAL.search(answer))
        or _nesting(answer) > MAX_NESTING
        or any(_digits(m[0]) > MAX_DIGITS for m in _TOWER.finditer(answer))
    )


def _nesting(answer: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{)\]}]", answer):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _digits(tower: str) -> float:
    """The number of decimal digits of a^b^c..., inf when even that is large."""
    numbers = [float(n[:300].rstrip(".") or 0) if n.count(".") < 2 else 0.0 for n in re.findall(r"\d[\d.]*", tower)]
    exponent = numbers.pop()
    while len(numbers) > 1:
        size = exponent * math.log10(max(numbers.pop(), 1.0))
        if size > 15:
            return math.inf
        exponent = 10.0**size
    return exponent * abs(math.log10(numbers[0])) if numbers[0] > 0 else 0.0


def too_large_expression(expression: Any) -> bool:
    """True when some part of a parsed, not yet computed expression is beyond the bounds."""
    import sympy

    if isinstance(expression, sympy.MatrixBase):
        return any(too_large_expression(e) for e in expression)
    if not isinstance(expression, sympy.Basic):
        return False
    return any(_too_large(node) for node in sympy.preorder_traversal(expression))


def _too_large(node: Any) -> bool:
    import sympy

    if isinstance(node, sympy.Rational):
        return max(abs(node.p).bit_length(), node.q.bit_length()) > MAX_DIGITS * 3.33
    if isinstance(node, sympy.factorial):
        return not _log10(node.args[0]) <= math.log10(MAX_FACTORIAL)
    if isinstance(node, sympy.binomial):
        return not _log10(node.args[0]) <= math.log10(MAX_DIGITS)
    if isinstance(node, sympy.Pow | sympy.exp):
        base, exponent = node.as_base_exp()
        if not exponent.is_number:
            return False
        # log10 of the number of digits: both signs of the exponent make a large number, on one side of the bar or the other
        if base.is_number:
            digits = _log10(exponent) + math.log10(max(abs(_log10(base)), 1e-9))
            return not digits <= math.log10(MAX_DIGITS)
        return not _log10(exponent) <= math.log10(MAX_POWER)
    if isinstance(node, sympy.Sum | sympy.Product):
        return any(_terms(limit) > MAX_TERMS for limit in node.limits)
    return False


def _terms(limit: Any) -> float:
    if len(limit) < 3 or not (limit[1].is_number and limit[2].is_number):
        return 0.0
    sizes = [_log10(bound) for bound in limit[1:3]]
    return 10.0 ** min(max(sizes), 300.0) if all(math.isfinite(s) or s == -math.inf for s in sizes) else 0.0


def _log10(node: Any) -> float:
    """An estimate from above of log10 |node|, without computing it: inf when it is huge, -inf for 0, 0 when nothing is known."""
    import sympy

    if isinstance(node, sympy.Rational):
        return -math.inf if node.p == 0 else math.log10(abs(node.p)) - math.log10(node.q)
    if isinstance(node, sympy.Float):
        return float(sympy.log(abs(node), 10)) if node != 0 else -math.inf
    if isinstance(node, sympy.NumberSymbol):
        return math.log10(float(node))
    if isinstance(node, sympy.Pow | sympy.exp):
        base, exponent = node.as_base_exp()
        power = _log10(exponent)
        return math.inf if power > 15 else 10.0**power * max(_log10(base), 0.0)
    if isinstance(node, sympy.Mul):
        return sum(_log10(a) for a in node.args)
    if isinstance(node, sympy.Add | sympy.Max | sympy.Min):
        return max(_log10(a) for a in node.args) + math.log10(len(node.args))
    if isinstance(node, sympy.factorial):
        size = _log10(node.args[0])
        return math.inf if size > 15 else 10.0**size * max(size, 0.0)
    if isinstance(node, sympy.Abs | sympy.floor | sympy.ceiling):
        return _log10(node.args[0])
    return 0.0
