r"""Functions in the answer parser: `\log_2 8`, `sin^2 x`, `atan2(1, 1)`, `sum(k^2, (k, 1, n))`, `\sum_{k=1}^{n} k^2`."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from llmrl.rewards.math_names import FUNCTIONS, PLUS
from llmrl.rewards.math_parse import Node, NotRead

if TYPE_CHECKING:
    from llmrl.rewards.math_parse import _Parser

_FUNCTION = re.compile(r"\\?(?:" + "|".join(FUNCTIONS) + ")")
_ONE: Node = ("num", Fraction(1), None)
_TEN: Node = ("num", Fraction(10), None)


def call(p: _Parser, name: str) -> Node:
    """The node of the function `name`, which has been read: its base or power, and its argument, in brackets or not. Raises NotRead."""
    base: Node | None = None
    power: Node | None = None
    for _ in range(2):
        if name == "log" and p.take("_"):
            base = _base(p)
        elif p.take("^"):
            power = p.exponent()
    found = re.compile(r"(10|2)\(").match(p.s, p.i) if name == "log" and base is None else None
    if found:
        base = ("num", Fraction(int(found[1])), None)
        p.i += len(found[1])
    if name == "arctan" and p.s.startswith("2(", p.i):
        name, p.i = "arctan2", p.i + 1
    args = _arguments(p, name)
    if name == "log10":
        name, base = "log", _TEN
    if name == "summation":
        return _summed(args)
    if name == "sqrt":
        node: Node = ("pow", args[0], ("div", _ONE, ("num", Fraction(2), None)))
    elif name == "cbrt":
        node = ("pow", args[0], ("div", _ONE, ("num", Fraction(3), None)))
    elif name == "exp":
        node = ("pow", ("const", "e"), args[0])
    elif name == "log" and base is not None:
        node = ("div", ("fn", "ln", args[:1]), ("fn", "ln", (base,)))
    elif power == ("neg", _ONE) and "arc" + name in FUNCTIONS:
        return ("fn", "arc" + name, args)
    else:
        node = ("fn", name, args)
    return node if power is None else ("pow", node, power)


def _base(p: _Parser) -> Node:
    r"""Of a logarithm: \log_23 is log_2 3, but log_10(3) has base 10."""
    digits = re.compile(r"\s*(\d{1,4})(?=\s*[({\\])").match(p.s, p.i)
    if digits is None:
        return p.single()
    p.i = digits.end()
    return ("num", Fraction(int(digits[1])), None)


def _arguments(p: _Parser, name: str) -> tuple[Node, ...]:
    token = p.peek()
    if token in ("(", "[", "{", r"\{"):
        inner = p.bracketed(token) if token in "([" else p.braces(token, call=True)
        if inner[0] in ("tuple", "set"):
            return tuple(inner[-1]) if inner[0] == "set" else tuple(inner[3])
        return (inner,)
    if name in ("sqrt", "cbrt"):
        return (p.atom(),)
    if token in PLUS[:2]:
        p.i += 1
        inner = p.power()
        return (("neg", inner) if token == "-" else inner,)
    node = p.power()
    while p.starts_atom(p.peek()) and p.peek() not in ("(", "[", "|") and not _FUNCTION.match(p.s, p.i):
        node = ("mul", node, p.power())
    return (node,)


def _summed(args: tuple[Node, ...]) -> Node:
    """summation(term, (k, from, to)), as computer algebra writes it."""
    if len(args) != 2 or args[1][0] != "tuple" or len(args[1][3]) != 3:
        raise NotRead("a sum without (variable, from, to)")
    return _sum("sum", args[1][3][0], args[1][3][1], args[1][3][2], args[0])


def big_operator(p: _Parser, name: str) -> Node:
    r"""\sum_{k=1}^{n} and \prod, whose command has been read. The term goes on to the next plus or minus."""
    p.expect("_")
    start = p.single()
    p.expect("^")
    end = p.single()
    if start[0] != "rel" or start[2] != ("=",):
        raise NotRead("a sum without a first index")
    return _sum(name, start[1][0], start[1][1], end, p.product())


def _sum(name: str, variable: Node, start: Node, end: Node, term: Node) -> Node:
    if variable[0] not in ("sym", "const") or len(variable) != 2:
        raise NotRead("a sum over no variable")
    return ("sum", name, variable, start, end, term)
