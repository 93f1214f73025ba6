r"""Sets of reals with finitely many pieces: intervals, unions, inequalities, `\mathbb{R} \setminus \{1\}`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from llmrl.rewards.math_parse import Node
from llmrl.rewards.math_value import NoValue, Point, Value, context, evaluate, same_number, symbols
from llmrl.rewards.math_value import _mp as real

MAX_PIECES = 100


@dataclass(frozen=True)
class End:
    """An end of an interval: `value` is mpf, -inf and inf included; `formula` is what it was written as, to be compared with symbols in it."""

    value: Value
    formula: Node | None
    open: bool


@dataclass(frozen=True)
class RealSet:
    """Pieces from left to right. `name`: the variable that it was written with; `certain`: it can be nothing but a set of reals."""

    pieces: tuple[tuple[End, End], ...]
    name: str | None = None
    certain: bool = True


def real_set(node: Node) -> RealSet | None:
    """The node as a set of reals, None when it is none. Where ends have symbols in them, one piece at most."""
    try:
        return _real_set(node)
    except NoValue:
        return None


def points(items: Sequence[Node]) -> RealSet | None:
    """Finitely many numbers as a set."""
    try:
        ends = [_end(i, False) for i in items]
    except NoValue:
        return None
    return replace(_union([(e, e) for e in ends]), certain=False)


def _real_set(node: Node) -> RealSet | None:
    kind = node[0]
    if kind == "tuple" and len(node) == 4 and len(node[3]) == 2:
        low, high = _end(node[3][0], node[1] == "("), _end(node[3][1], node[2] == ")")
        infinite = not (context().isfinite(low.value) and context().isfinite(high.value))
        certain = node[1] == "[" or node[2] == "]" or infinite
        if not low.value < high.value and not (low.value == high.value and not low.open and not high.open):
            return None
        return RealSet(((low, high),), certain=certain)
    if kind == "all" and node[1] == "R":
        return RealSet(((_infinity(-1), _infinity(1)),))
    if kind == "all" and node[1] in ("R+", "R-"):
        zero = End(context().mpf(0), None, True)
        return RealSet(((zero, _infinity(1)),) if node[1] == "R+" else ((_infinity(-1), zero),))
    if kind == "empty":
        return RealSet(())
    if kind == "in" and node[1][0] == "sym":
        inner = _element_of(node[2])
        return None if inner is None else replace(inner, name=node[1][1], certain=True)
    if kind == "rel":
        return _relation(node)
    if kind == "such":
        return _such(node)
    if kind in ("or", "and", "seq"):
        return _joined(node)
    if kind in ("cup", "cap", "setminus"):
        a, b = _element_of(node[1]), _element_of(node[2])
        if a is None or b is None:
            return None
        if kind == "cup":
            return _union([*a.pieces, *b.pieces])
        return _intersection(a, b if kind == "cap" else _complement(b))
    return None


def _element_of(node: Node) -> RealSet | None:
    if node[0] == "set":
        return points(node[1])
    return _real_set(node)


def _such(node: Node) -> RealSet | None:
    r"""{x | x > 1}, {x \in R : x > 1}."""
    inner, name = node[1], None
    if inner[0] == "in" and inner[2][0] == "all" and inner[2][1] == "R":
        inner = inner[1]
    if inner[0] != "sym":
        return None
    name = inner[1]
    found = _real_set(node[2])
    return None if found is None or found.name != name else replace(found, name=None, certain=True)


def _infinity(sign: int) -> End:
    return End(context().inf * sign, None, True)


def _end(node: Node, is_open: bool) -> End:
    if node[0] == "inf" or (node[0] == "neg" and node[1] == ("inf",)):
        return _infinity(1 if node[0] == "inf" else -1)
    if node[0] in ("tuple", "seq", "set", "rel", "matrix", "or", "and", "based", "pct", "ratio"):
        raise NoValue("no number")
    value = real(evaluate(node, Point(0)))
    mp = context()
    if isinstance(value, mp.mpc):
        if abs(value.imag) > mp.mpf(10) ** -40:
            raise NoValue("a complex end")
        value = value.real
    return End(value if isinstance(value, mp.mpf) else mp.mpf(value), node, is_open)


def _relation(node: Node) -> RealSet | None:
    """x > 1, 1 < x <= 2, x != 3, x = 4 with numbers for ends; what is to the left and right of the variable has no variable of its own."""
    sides, signs = node[1], node[2]
    if signs == ("!=",) and sides[1][0] == "pm":  # x is neither
        return _joined(("and", tuple(("rel", (sides[0], s), signs) for s in (sides[1][2], ("neg", sides[1][2])))))
    if len(sides) == 2 and (found := _distance(sides, signs[0])) is not None:
        return found
    if len(sides) == 3 and (found := _ring(sides, signs)) is not None:
        return found
    names = [i for i, s in enumerate(sides) if s[0] == "sym" or (len(sides) == 3 and i == 1 and _is_call(s))]
    if len(names) != 1:
        names = [
            i
            for i, s in enumerate(sides)
            if s[0] == "sym" and all(not symbols(o) for j, o in enumerate(sides) if j != i)
        ]
    if len(names) != 1 or len(sides) > 3 or (len(sides) == 3 and names[0] != 1):
        return None
    at = names[0]
    name = sides[at][1] if sides[at][0] == "sym" else None
    if any(name in symbols(s) for i, s in enumerate(sides) if i != at):
        return None
    pieces: RealSet = RealSet(((_infinity(-1), _infinity(1)),))
    for i, sign in enumerate(signs):
        other, flip = (sides[i], True) if i + 1 == at else (sides[i + 1], False)
        pieces = _intersection(pieces, _ray(other, _flip(sign) if flip else sign))
    return replace(pieces, name=name, certain=set(signs) != {"="})


def _is_call(node: Node) -> bool:
    """f(x) in 0 < f(x) < 1."""
    return node[0] == "mul" and node[1][0] == node[2][0] == "sym"


def _ring(sides: Sequence[Node], signs: Sequence[str]) -> RealSet | None:
    """1 <= |x| < 2."""
    if sides[1][:2] != ("fn", "abs"):
        return None
    parts = [_distance((sides[1], sides[2]), signs[1]), _distance((sides[1], sides[0]), _flip(signs[0]))]
    if parts[0] is None or parts[1] is None:
        return None
    return _intersection(parts[0], parts[1])


def _distance(sides: Sequence[Node], sign: str) -> RealSet | None:
    """|x| < 2 and |2x - 1| > 3: a bound on the absolute value of what is linear in one variable."""
    if sides[1][0] == "fn":
        sides, sign = (sides[1], sides[0]), _flip(sign)
    if sides[0][:2] != ("fn", "abs") or symbols(sides[1]) or sign in ("=", "!="):
        return None
    inner, is_open = sides[0][2][0], sign in ("<", ">")
    radius = _end(sides[1], is_open)
    if not radius.value > 0:
        return None
    if inner[0] == "sym":
        name, low, high = inner[1], replace(radius, value=-radius.value, formula=("neg", sides[1])), radius
    else:
        if (line := _line(inner)) is None or not context().isfinite(radius.value):
            return None
        name, slope, start = line
        ends = sorted((side - start) / slope for side in (-radius.value, radius.value))
        low, high = (End(e, None, is_open) for e in ends)
    pieces = ((low, high),) if sign in ("<", "<=") else ((_infinity(-1), low), (high, _infinity(1)))
    return RealSet(pieces, name=name)


def _line(node: Node) -> tuple[str, Value, Value] | None:
    """(x, a, b) of a x + b with real numbers a and b; None for what is no such formula."""
    if len(names := symbols(node)) != 1:
        return None
    name = next(iter(names))
    at = [real(evaluate(node, Point(0, real_i=True, fixed={name: Fraction(i)}))) for i in (0, 1, 2, 7)]
    if not all(isinstance(v, context().mpf) for v in at):
        return None
    slope = at[1] - at[0]
    straight = all(same(at[0] + i * slope, v) for i, v in ((2, at[2]), (7, at[3])))
    return (name, slope, at[0]) if straight and not same(slope, context().mpf(0)) else None


def _flip(sign: str) -> str:
    return {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(sign, sign)


def _ray(bound: Node, sign: str) -> RealSet:
    end = _end(bound, sign in ("<", ">"))
    if not context().isfinite(end.value):
        if sign == "=":
            raise NoValue("equal to infinity")
        return RealSet(((_infinity(-1), _infinity(1)),))
    if sign in ("<", "<="):
        return RealSet(((_infinity(-1), end),))
    if sign in (">", ">="):
        return RealSet(((end, _infinity(1)),))
    point = RealSet(((end, end),))
    return point if sign == "=" else _complement(point)


def _joined(node: Node) -> RealSet | None:
    """Inequalities joined by or (a union), by and or commas (an intersection, or a union where that is empty of sense)."""
    parts = [_real_set(i) for i in node[1]]
    found = [p for p in parts if p is not None]
    if len(found) != len(parts) or not any(p.certain for p in found) or len(found) > MAX_PIECES:
        return None
    names = {p.name for p in found} - {None}
    if len(names) > 1 or (not names and node[0] != "or"):
        return None
    out = found[0]
    for part in found[1:]:
        out = _union([*out.pieces, *part.pieces]) if node[0] == "or" else _intersection(out, part)
    return replace(out, name=names.pop() if names else None, certain=True)


def _union(pieces: Sequence[tuple[End, End]]) -> RealSet:
    if len(pieces) > MAX_PIECES:
        raise NoValue("too many pieces")
    out: list[tuple[End, End]] = []
    for low, high in sorted(pieces, key=lambda p: (p[0].value, p[0].open)):
        if out and _touches(out[-1][1], low):
            before, end = out[-1]
            farther = high if (high.value, not high.open) > (end.value, not end.open) else end
            out[-1] = (before, farther)
        else:
            out.append((low, high))
    return RealSet(tuple(out))


def _touches(end: End, start: End) -> bool:
    if same(end.value, start.value):
        return not (end.open and start.open)
    return bool(end.value > start.value)


def _intersection(a: RealSet, b: RealSet) -> RealSet:
    out = []
    for low, high in a.pieces:
        for low2, high2 in b.pieces:
            start = max(low, low2, key=lambda e: (e.value, e.open))
            end = min(high, high2, key=lambda e: (e.value, not e.open))
            if start.value < end.value or (same(start.value, end.value) and not start.open and not end.open):
                out.append((start, end))
    return RealSet(tuple(out), a.name or b.name)


def _complement(a: RealSet) -> RealSet:
    out = []
    low = _infinity(-1)
    for start, end in a.pieces:
        if low.value < start.value:
            out.append((low, replace(start, open=not start.open)))
        low = replace(end, open=not end.open)
    if context().isfinite(low.value) or not a.pieces:
        out.append((low, _infinity(1)))
    return RealSet(tuple(out))


def same(a: Value, b: Value) -> bool:
    mp = context()
    if not (mp.isfinite(a) and mp.isfinite(b)):
        return bool(a == b)
    return same_number(a, b)


def same_set(gold: RealSet, answer: RealSet) -> bool:
    """Equal pieces with equal ends; two variables must have one name."""
    if gold.name and answer.name and gold.name != answer.name:
        return False
    if len(gold.pieces) != len(answer.pieces):
        return False
    return all(
        _same_end(x, y) for a, b in zip(gold.pieces, answer.pieces, strict=True) for x, y in zip(a, b, strict=True)
    )


def _same_end(a: End, b: End) -> bool:
    from llmrl.rewards.math_equal import equal

    if a.open != b.open:
        return False
    if a.formula is None or b.formula is None:
        return same(a.value, b.value)
    return equal(a.formula, b.formula) is True
