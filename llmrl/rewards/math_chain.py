"""Equations in a row: of "2x = 10 and x = 5" the last is the answer, x_1 = 2 and x_2 = 3 are two roots, 2^{10} is a number."""

from __future__ import annotations

import re
from fractions import Fraction

from llmrl.rewards.math_parse import Node
from llmrl.rewards.math_value import NoValue, Point, evaluate, has, replaced, same_number, symbols, walk

_FORMULAS = {"num", "sym", "add", "mul", "div", "pow", "neg", "fn", "const"}
MAX_SIDES = 12


def is_total(node: Node) -> bool:
    """m + n = 145, p^2 + q^2 = 9: a question's formula of several unknowns. Of an answer only: as a reference it is an equation."""
    left = node[1][0]
    if set(node[2]) != {"="} or symbols(node[1][-1]):
        return False
    plain_sum = left[0] == "add" and all(n[0] in ("add", "sym", "mul") for n in walk(left))
    return plain_sum or (left[0] in _FORMULAS and len(symbols(left)) > 1)


def number_chain(node: Node) -> bool:
    """12 + 30 = 42: an equation between numbers says what its last side is, as public graders' tests have it, whatever the middle says."""
    return set(node[2]) == {"="} and not any(symbols(side) for side in node[1])


def identity(node: Node) -> bool:
    """2(x+1) = 2x+2: the first side is the last, whatever x is."""
    first, last = node[1][0], node[1][-1]
    if set(node[2]) != {"="} or first[0] not in _FORMULAS or last[0] not in _FORMULAS:
        return False
    return all(same_number(evaluate(first, p), evaluate(last, p)) for p in map(Point, range(3)))


def deduced(node: Node) -> Node:
    """Of equations in one unknown, the last of which gives its value, and the others of which hold there, that last one."""
    if node[0] not in ("and", "seq") or not 2 <= len(node[1]) <= MAX_SIDES:
        return node
    *before, last = node[1]
    if any(i[0] != "rel" or set(i[2]) != {"="} or len(i[1]) != 2 for i in node[1]):
        return node
    name, value = last[1]
    if name[0] != "sym" or symbols(value) or any(symbols(i) != {name[1]} or i[1][0] == name for i in before):
        return node
    try:
        at = Point(0, fixed={name[1]: evaluate(value, Point(0))})
        holds = all(same_number(*(evaluate(s, at) for s in i[1])) for i in before)
    except NoValue:
        return node
    return last if holds else node


def bound(node: Node, other: Node) -> Node:
    r"""Without "k \in \mathbb{Z}" at its end, where the other side does not say it."""
    if _counter(node) is not None and not has(other, "in"):
        return node[1][0] if len(node[1]) == 2 else ("seq", node[1][:-1])
    return node


def renamed(gold: Node, answer: Node) -> Node:
    r"""The answer with the reference's name for what runs over the same numbers: "n\pi, n \in \mathbb{Z}" for "k\pi, k \in \mathbb{Z}"."""
    ours, theirs = _counter(gold), _counter(answer)
    if ours is None or theirs is None or ours == theirs or ours[1] in symbols(answer) or theirs[1] in symbols(gold):
        return answer
    renamed_answer: Node = replaced(answer, theirs, ours)
    return renamed_answer


def _counter(node: Node) -> Node | None:
    r"""The k of "..., k \in \mathbb{Z}"."""
    last = node[1][-1] if node[0] == "seq" else node
    return last[1] if node[0] == "seq" and last[0] == "in" and last[1][0] == "sym" and last[2][0] == "all" else None


def one_stem(names: tuple[Node, ...]) -> bool:
    """Whether names are x_1, x_2, ...: one unknown, of which several values are given."""
    stems = [re.fullmatch(r"(.+?)_?(\d+)", n[1]) if n[0] == "sym" else None for n in names]
    found = [(m[1], m[2]) for m in stems if m is not None]
    return len(found) == len(names) and len({f[0] for f in found}) == 1 and len({f[1] for f in found}) == len(names)


def whole_number(node: Node) -> bool:
    """Whether the node is a formula without symbols, such as 2^{10}, whose value is a whole number."""
    if node[0] not in _FORMULAS or symbols(node) or has(node, "pct") or has(node, "deg") or has(node, "pm"):
        return False
    try:
        value = evaluate(node, Point(0))
    except NoValue:
        return False
    return isinstance(value, Fraction) and value.denominator == 1
