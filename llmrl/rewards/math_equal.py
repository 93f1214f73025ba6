r"""Whether two parsed answers are equal: numbers and formulas by value, collections by their elements, sets of reals by their ends.

The verdict is True, False, or None where the answers were read but their values are not known here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from llmrl.rewards.math_chain import bound, deduced, identity, is_total, number_chain, one_stem, renamed
from llmrl.rewards.math_matrix import computed
from llmrl.rewards.math_parse import Node
from llmrl.rewards.math_sets import RealSet, real_set, same_set
from llmrl.rewards.math_value import (
    NoValue,
    Point,
    TooLarge,
    Value,
    _combine,
    _mp,
    context,
    evaluate,
    has,
    literal,
    replaced,
    rounded,
    same_number,
    symbols,
    walk,
)

MAX_ITEMS = 200
_SCALARS = {"num", "sym", "const", "add", "mul", "div", "pow", "neg", "pm", "deg", "pct", "fn", "based", "inf", "sum"}
_COLLECTIONS = {"seq", "set", "or", "and"}


def equal(gold: Node, answer: Node) -> bool | None:
    """Whether the two are the same answer. None: not decided here. Bounded in time but for mpmath's functions, whose arguments are bounded."""
    try:
        return _equal(gold, answer)
    except TooLarge:
        return False
    except (NoValue, RecursionError):
        return None


def _equal(gold: Node, answer: Node) -> bool | None:
    if gold == answer:
        return True
    answer = renamed(gold, deduced(answer))
    gold, answer = _spread(bound(gold, answer), answer), _spread(bound(answer, gold), gold)
    gold, answer = _named(gold, answer)
    if gold == answer:
        return True
    if (verdict := _sets(gold, answer)) is not None:
        return verdict
    gold, answer = _expand(computed(gold)), _expand(computed(answer))
    kinds = gold[0], answer[0]
    if "matrix" in kinds:
        return _matrices(gold, answer)
    if "cases" in kinds:
        return kinds == ("cases", "cases") and _same_elements(gold[1], answer[1], rows=True)
    if any(k in _COLLECTIONS for k in kinds) or "tuple" in kinds:
        return _collections(gold, answer)
    if "rel" in kinds or "in" in kinds:
        return _relations(gold, answer) if kinds == ("rel", "rel") else False
    if "ratio" in kinds:
        return _ratios(gold, answer)
    if "based" in kinds:
        return kinds == ("based", "based") and gold[1:] == answer[1:]
    if kinds[0] in _SCALARS and kinds[1] in _SCALARS:
        return _scalars(gold, answer)
    if kinds[0] != kinds[1] and {"empty", "all"} & set(kinds):
        return False
    if kinds == ("all", "all"):
        return gold[1] == answer[1]
    return None


def _named(gold: Node, answer: Node) -> tuple[Node, Node]:
    r"""Without the names that only one side gives: of "x = 5" and "5", of "f(x) = 2x" and "2x", of "x \in [0, 1]" and "[0, 1]"."""
    gold, answer = _located(gold, answer), _located(answer, gold)
    names = _name(gold), _name(answer)
    if names[0] is not None and names[1] is not None:
        # f(x) = 2x + 3 is also the graph y = 2x + 3.
        if names[0] == names[1] or (("sym", "y") in names and any(_is_call(n) for n in names)):
            return _value(gold), _value(answer)
        return gold, answer
    if names[0] is not None and answer[0] not in ("rel", "in"):
        gold = _value(gold)
    elif names[1] is not None and gold[0] not in ("rel", "in"):
        answer = _value(answer)
    elif gold[0] not in ("rel", "in") and answer[0] == "rel" and number_chain(answer):
        answer = answer[1][-1]
    elif answer[0] not in ("rel", "in") and gold[0] == "rel" and number_chain(gold):
        gold = gold[1][-1]
    elif gold[0] in _SCALARS and answer[0] == "rel" and ((is_total(answer) and not symbols(gold)) or identity(answer)):
        answer = answer[1][-1]
    return gold, answer


def _located(node: Node, other: Node) -> Node:
    """A(1, 2) as the pair (1, 2), unless the other side names another point."""
    if node[0] != "mul" or node[1][0] != "sym" or node[2][0] != "tuple" or not node[1][1].isupper():
        return node
    return node if other[0] == "mul" and other[1] != node[1] else node[2]


def _spread(node: Node, other: Node) -> Node:
    """(x, y) = (1, 2) as x = 1, y = 2, where the other side is such a list."""
    if other[0] not in _COLLECTIONS or node[0] != "rel" or node[2] != ("=",) or any(s[0] != "tuple" for s in node[1]):
        return node
    left, right = node[1][0][3], node[1][1][3]
    if len(left) != len(right):
        return node
    return ("seq", tuple(("rel", pair, ("=",)) for pair in zip(left, right, strict=True)))


def _is_call(node: Node | None) -> bool:
    """f(x), which reads as the product of two symbols."""
    return node is not None and node[0] == "mul" and node[1][0] == node[2][0] == "sym" and node[2][1] == "x"


def _name(node: Node) -> Node | None:
    r"""What an equation or a membership gives a value to: x, f(x), S_{10}, AB, (x, y); None where the node is no such statement."""
    if node[0] == "in":
        return node[1] if _is_name(node[1]) else None
    if node[0] != "rel" or set(node[2]) != {"="}:
        return None
    left, right = node[1][0], node[1][-1]
    if not _is_name(left):
        return None
    own = symbols(left)
    return None if left[0] == "sym" and own & symbols(right) else left


def _is_name(node: Node) -> bool:
    kind = node[0]
    if kind == "sym" or (kind == "const" and node[1] in "Ie"):
        return True
    if kind == "mul":
        return all(
            _is_name(n)
            or (n[0] == "tuple" and all(_is_name(i) or i[0] == "num" for i in n[3]))
            or (n[0] == "num" and n is node[2])
            for n in node[1:]
        )
    if kind == "div":  # dy/dx
        return all(_is_name(n) for n in node[1:])
    if kind == "tuple":
        return all(_is_name(n) for n in node[3])
    if kind == "ratio":
        return all(_is_name(n) for n in node[1])
    return (
        kind == "fn"
        and node[1] in ("abs", "sin", "cos", "tan", "max", "min", "det", "Re", "Im")
        and all(_is_name(n) for n in node[2])
    )


def _value(node: Node) -> Node:
    return node[2] if node[0] == "in" else node[1][-1]


def _sets(gold: Node, answer: Node) -> bool | None:
    """The verdict on sets of reals, where one side can be nothing else; None otherwise."""
    sets = real_set(gold), real_set(answer)
    if (sets[0] is None and sets[1] is None) or "matrix" in (gold[0], answer[0]):
        return None
    certain = [s is not None and s.certain for s in sets]
    if not any(certain):
        return None
    a, b = (s if s is not None else _points(n) for s, n in zip(sets, (gold, answer), strict=True))
    if a is None or b is None:
        return None if "rel" in (gold[0], answer[0]) else False
    return same_set(a, b)


def _points(node: Node) -> RealSet | None:
    r"""A list or set of numbers as a set of reals, to be compared with "x = 1 or x > 2" and the like."""
    from llmrl.rewards.math_sets import points

    if node[0] in _COLLECTIONS:
        return points(node[1])
    return points((node,)) if node[0] in _SCALARS else None


def _expand(node: Node) -> Node:
    r"""Plus-or-minus as the two it stands for; "x = 1 or x = 2" and "x = \pm 1" as the values, where all are of one name."""
    if node[0] in _COLLECTIONS:
        items = node[1]
        if len(items) > MAX_ITEMS:
            raise TooLarge("too many elements")
        if items and all(i[0] == "rel" for i in items):
            names = [_name(i) for i in items]
            if None not in names and len(set(names)) == 1:
                return _expand((node[0], tuple(_value(i) for i in items)))
            if None not in names and len(set(names)) == len(names):
                return ("tuple", "(", ")", tuple(_value(i) for i in items), tuple(names))
        if items and items[0][0] == "rel" and _name(items[0]) is not None and all(i[0] in _SCALARS for i in items[1:]):
            return _expand((node[0], (_value(items[0]), *items[1:])))  # x = 1, 2
        if any(has(i, "pm") for i in items):
            spread = [e for i in items for e in _both(i)]
            return (node[0], tuple(spread))
        return node
    if node[0] == "rel" and has(node, "pm") and _name(node) is not None:
        return ("set", tuple(("rel", (node[1][0], e), ("=",)) for e in _both(node[1][-1])))
    if node[0] in (*_SCALARS, "tuple") and has(node, "pm"):
        return ("set", tuple(_both(node)))
    return node


def _both(node: Node) -> list[Node]:
    """The two that plus-or-minus stands for; in a pair, the same sign is meant throughout."""
    if node[0] == "tuple" and has(node, "pm"):
        return [(*node[:3], tuple(_signed(i, sign) for i in node[3]), *node[4:]) for sign in (1, -1)]
    if node[0] not in _SCALARS or not has(node, "pm"):
        return [node]
    return [_signed(node, 1), _signed(node, -1)]


def _signed(node: Any, sign: int) -> Any:
    """The node, or the tuple of nodes, with each plus-or-minus in it as the one or the other."""
    if not isinstance(node, tuple):
        return node
    if node and node[0] == "pm":
        inner = _signed(node[2], sign)
        return inner if node[1] * sign > 0 else ("neg", inner)
    return tuple(_signed(n, sign) for n in node)


def _matrices(gold: Node, answer: Node) -> bool:
    rows = [_rows(gold), _rows(answer)]
    if rows[0] is None or rows[1] is None:
        # A single column or row is the vector that a tuple is.
        flat = [_vector(gold), _vector(answer)]
        return flat[0] is not None and flat[1] is not None and _all_equal(flat[0], flat[1])
    if [len(r) for r in rows[0]] != [len(r) for r in rows[1]]:
        return False
    return all(_all_equal(a, b) for a, b in zip(rows[0], rows[1], strict=True))


def _rows(node: Node) -> tuple[tuple[Node, ...], ...] | None:
    if node[0] == "matrix":
        return node[1]
    if node[0] == "tuple" and all(i[0] == "tuple" for i in node[3]):
        return tuple(i[3] for i in node[3])
    return None


def _vector(node: Node) -> tuple[Node, ...] | None:
    if node[0] == "tuple":
        return node[3]
    if node[0] == "matrix":
        if len(node[1]) == 1:
            return node[1][0]
        return tuple(r[0] for r in node[1]) if len(node[1][0]) == 1 else None
    return None


def _all_equal(gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    return len(gold) == len(answer) and all(equal(a, b) is True for a, b in zip(gold, answer, strict=True))


def _collections(gold: Node, answer: Node) -> bool | None:
    tuples = gold[0] == "tuple", answer[0] == "tuple"
    if all(tuples):
        # Brackets tell intervals apart; those have been compared, so that here they matter only for pairs.
        # A list of named values is none.
        if len(gold[3]) == 2 == len(answer[3]) and len(gold) == len(answer) == 4 and gold[1:3] != answer[1:3]:
            return False
        if len(gold) == len(answer) == 5:
            return _same_elements(
                tuple(zip(gold[4], gold[3], strict=True)), tuple(zip(answer[4], answer[3], strict=True)), pairs=True
            )
        return _all_equal(gold[3], answer[3])
    if any(tuples):
        ordered, other = (gold, answer) if tuples[0] else (answer, gold)
        if tuples[1] and len(answer) == 5 and one_stem(answer[4]):
            return _same_elements(gold[1], answer[3]) if gold[0] in _COLLECTIONS else False  # roots x_1 = 2, x_2 = 3
        if other[0] in ("seq", "and"):
            return _all_equal(ordered[3], other[1]) if ordered[1:3] != ("[", ")") else False
        # A one-element list of python, and sets written with brackets: [1, 2] for {1, 2}.
        return False
    items = tuple(n[1] if n[0] in _COLLECTIONS else (n,) for n in (gold, answer))
    return _same_elements(*items)


def _same_elements(gold: Sequence[Node], answer: Sequence[Node], *, pairs: bool = False, rows: bool = False) -> bool:
    """As sets: each element of one is in the other, repetitions count once."""
    if max(len(gold), len(answer)) > MAX_ITEMS:
        raise TooLarge("too many elements")

    def same(a: Node, b: Node) -> bool:
        if rows:
            return _all_equal(a, b)
        if pairs:
            return a[0] == b[0] and equal(a[1], b[1]) is True
        return equal(a, b) is True

    left = list(answer)
    for item in gold:
        found = [a for a in left if same(item, a)]
        if not found:
            if not any(same(item, a) for a in answer):
                return False
            continue
        left = [a for a in left if a not in found]
    return not left


def _ratios(gold: Node, answer: Node) -> bool:
    """A ratio of two numbers is also their quotient."""
    if gold[0] == answer[0]:
        return _all_equal(gold[1], answer[1])  # unscaled: 2:10 can be a time, which 1:05 is not
    ratio, other = (gold, answer) if gold[0] == "ratio" else (answer, gold)
    return len(ratio[1]) == 2 and other[0] in _SCALARS and equal(("div", *ratio[1]), other) is True


_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def _relations(gold: Node, answer: Node) -> bool | None:
    """Two equations with the same solutions up to a constant factor; two inequalities up to a factor whose sign agrees with theirs."""
    if len(gold[1]) != len(answer[1]):
        return None
    if len(gold[1]) > 2:
        straight = gold[2] == answer[2] and _all_equal(gold[1], answer[1])
        flipped = tuple(_FLIPPED[s] for s in reversed(answer[2]))
        return straight or (gold[2] == flipped and _all_equal(gold[1], tuple(reversed(answer[1]))))
    if symbols(gold) != symbols(answer):
        return False
    if not symbols(gold):  # between numbers there is no unknown that both could be about
        return gold[2] == answer[2] and _all_equal(gold[1], answer[1])
    differences = [("add", n[1][0], ("neg", n[1][1])) for n in (gold, answer)]
    verdict = _proportional(differences)
    if verdict is not None and verdict != 0:
        sign = gold[2][0]
        return answer[2][0] == (sign if verdict > 0 else _FLIPPED[sign])
    return gold[2] == answer[2] == ("=",) and _same_solutions(differences, symbols(gold))


def _proportional(differences: Sequence[Node]) -> int | None:
    """The sign of the constant that one is of the other times; None when the factor is no real constant."""
    ratios = []
    for point in _points_for(*differences, real_i=True):
        a, b = (evaluate(d, point) for d in differences)
        if same_number(a, Fraction(0)) or same_number(b, Fraction(0)):
            if same_number(a, b):
                continue
            return None
        ratios.append(_ratio(a, b))
    if not ratios or not all(same_number(r, ratios[0]) for r in ratios):
        return None
    real = ratios[0] if isinstance(ratios[0], Fraction) else ratios[0].real
    return 1 if real > 0 else -1 if real < 0 else 1


def _same_solutions(differences: Sequence[Node], names: frozenset[str]) -> bool:
    """Whether two equations that are linear in one of their symbols give it the same value: y = 1/x and xy = 1."""
    for name in sorted(names):
        roots = [[_root(d, name, number) for number in range(3)] for d in differences]
        if all(r is not None for side in roots for r in side):
            return all(same_number(a, b) for a, b in zip(*roots, strict=True))
    return False


def _root(difference: Node, name: str, number: int) -> Value | None:
    values = []
    for at in (0, 1, 2):
        try:
            values.append(evaluate(difference, Point(number, real_i=True, fixed={name: Fraction(at)})))
        except NoValue:
            return None
    slope = _combine(values[1], values[0], operator.sub)
    if same_number(slope, Fraction(0)) or not same_number(_combine(values[2], values[1], operator.sub), slope):
        return None
    return _combine(-values[0], slope, operator.truediv)


def _ratio(a: Value, b: Value) -> Value:
    return _combine(a, b, operator.truediv)


def _points_for(*nodes: Node, real_i: bool = False) -> list[Point]:
    """Symbols are positive, as under roots; where a bar or a sign function tells positive from negative, they are both."""
    if any(has(n, "sum") or has(n, "fn", "gcd") or has(n, "fn", "lcm") for n in nodes):
        return [Point(i, real_i=real_i, whole=True) for i in range(4)]
    free = frozenset().union(*(symbols(n) for n in nodes))
    if not free and not real_i:
        return [Point(0)]
    split = any(has(n, "fn", name) for n in nodes for name in ("abs", "sgn", "max", "min", "floor", "ceil"))
    return [Point(i, real_i=real_i) for i in range(3)] + (
        [Point(i, negative=True, real_i=real_i) for i in range(3, 8)] if split else []
    )


def _scalars(gold: Node, answer: Node) -> bool | None:
    if "inf" in (gold[0], answer[0]) or has(gold, "inf") or has(answer, "inf"):
        return _infinite(gold) is not None and _infinite(gold) == _infinite(answer)
    points = _points_for(gold, answer)
    if _agree(gold, answer, points):
        return True
    if any(has(n, "pct") for n in (gold, answer)) and _percent(gold, answer):
        return True
    if any(has(n, "deg") for n in (gold, answer)) and _degrees(gold, answer):
        return True
    e = ("const", "e"), ("sym", "E")
    for capital, small in ((gold, answer), (answer, gold)):
        if has(capital, *e[1]) and has(small, *e[0]) and not has(small, *e[1]) and not has(capital, *e[0]):
            return _agree(replaced(gold, e[1], e[0]), replaced(answer, e[1], e[0]), points)
    if has(gold, "fn", "log") or has(answer, "fn", "log"):
        return _agree(gold, answer, [Point(p.number, negative=p.negative, log10=True) for p in points])
    return False


def _agree(gold: Node, answer: Node, points: Sequence[Point]) -> bool:
    decimals = literal(gold), literal(answer)
    for point in points:
        a, b = evaluate(gold, point), evaluate(answer, point)
        if not same_number(a, b) and not _rounded(a, b, *decimals, decimal=_has_decimal(gold) or _has_decimal(answer)):
            return False
    return True


def _rounded(
    a: Value, b: Value, gold: tuple[Fraction, int] | None, answer: tuple[Fraction, int] | None, *, decimal: bool
) -> bool:
    """Whether unequal values differ by rounding only; `gold` and `answer` are the sides as decimal literals, where they are such."""
    if gold is not None and answer is not None:
        return bool(abs(a - b) <= abs(a) / 10**9)  # floating point noise
    if gold is not None:
        return rounded(gold, b)
    if answer is not None:
        return rounded(answer, a)
    return decimal and _near(a, b)


def _has_decimal(node: Node) -> bool:
    return any(n[0] == "num" and len(n) == 3 and n[2] is not None for n in walk(node))


def _near(a: Value, b: Value) -> bool:
    mp = context()
    x, y = mp.mpc(_mp(a)), mp.mpc(_mp(b))
    return bool(abs(x - y) <= mp.mpf("2e-6") * max(abs(x), abs(y)))


def _percent(gold: Node, answer: Node) -> bool:
    """50% is 0.5, and also 50 where the other side has no percent sign: the question asked for percent."""
    bare = [
        n[1] if n[0] == "pct" else ("neg", n[1][1]) if n[0] == "neg" and n[1][0] == "pct" else n for n in (gold, answer)
    ]
    if gold[0] == answer[0] == "pct":
        return False
    return _agree(bare[0], bare[1], [Point(0)]) if not symbols(gold) | symbols(answer) else False


def _degrees(gold: Node, answer: Node) -> bool:
    """90 degrees is pi/2, and also 90 where the other side has no degree sign."""
    bare = [
        n[1] if n[0] == "deg" else ("neg", n[1][1]) if n[0] == "neg" and n[1][0] == "deg" else n for n in (gold, answer)
    ]
    return _agree(bare[0], bare[1], _points_for(gold, answer))


def _infinite(node: Node) -> int | None:
    """1 or -1 for plus and minus infinity."""
    if node[0] == "inf":
        return 1
    if node[0] == "neg":
        inner = _infinite(node[1])
        return None if inner is None else -inner
    return None
