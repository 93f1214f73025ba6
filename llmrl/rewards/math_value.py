"""Values of parsed answers: exact fractions as long as they stay exact, else numbers of some 60 digits; never more than the bounds allow."""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from llmrl.rewards.math_guard import MAX_DIGITS, MAX_FACTORIAL
from llmrl.rewards.math_parse import Node

Value = Any  # Fraction, mpf or mpc
_BITS = 220
SHOWN_DIGITS = 10**4  # five significant digits
MAX_SUM = 500  # terms
_MAX_BITS = int(MAX_DIGITS * 3.33)


class NoValue(Exception):
    """The node has no number for a value: a set, an unknown function, a division by zero."""


class TooLarge(NoValue):
    """Refused by its size before it was computed."""


@functools.cache
def context() -> Any:
    """mpmath with a precision of its own, so that nobody else's setting matters."""
    import mpmath

    mp = mpmath.MPContext() if hasattr(mpmath, "MPContext") else mpmath.mp.clone()
    mp.prec = _BITS
    return mp


class Point:
    """Where symbols are evaluated: at values that depend on their names and `number` alone, so that both sides see the same.

    negative: symbols may be below 0. log10: `log` without a base is the decimal one. real_i: i and I are symbols, not the imaginary
    unit. whole: symbols are integers from 2 to 11, as the ends of sums must be. fixed: values of some symbols.
    """

    def __init__(
        self, number: int, *, negative: bool = False, log10: bool = False, real_i: bool = False, whole: bool = False,
        fixed: Mapping[str, Value] | None = None,
    ) -> None:  # fmt: skip
        self.number, self.negative, self.log10, self.real_i, self.whole = number, negative, log10, real_i, whole
        self.fixed = fixed or {}

    def with_fixed(self, name: str, value: Value) -> Point:
        """The same point but for one symbol."""
        return Point(self.number, negative=self.negative, log10=self.log10, real_i=self.real_i, whole=self.whole, fixed={**self.fixed, name: value})  # fmt: skip

    def value(self, name: str) -> Value:
        """The symbol's value: a fraction between 0.03 and 2.6, or minus that."""
        if name in self.fixed:
            return self.fixed[name]
        digest = hashlib.blake2b(f"{self.number}:{name}".encode(), digest_size=6).digest()
        if self.whole:
            return Fraction(int.from_bytes(digest, "big") % 10 + 2)
        size = Fraction(int.from_bytes(digest, "big") % 9973 + 137, 4001)
        return -size if self.negative and digest[0] % 2 else size


def evaluate(node: Node, point: Point) -> Value:
    """The value of a scalar node. Raises NoValue, TooLarge."""
    try:
        return _evaluate(node, point)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
        raise NoValue(str(error)) from None


def _evaluate(node: Node, at: Point) -> Value:
    kind = node[0]
    if kind == "num":
        return node[1]
    if kind == "sym":
        return at.value(node[1])
    if kind == "const":
        return _constant(node[1], at)
    if kind in ("add", "mul", "div", "pow"):
        a, b = _evaluate(node[1], at), _evaluate(node[2], at)
        if kind == "add":
            return _combine(a, b, lambda x, y: x + y)
        if kind == "mul":
            return _bounded(_combine(a, b, lambda x, y: x * y))
        if kind == "div":
            if b == 0:
                raise ZeroDivisionError
            return _bounded(_combine(a, b, lambda x, y: x / y))
        return _power(a, b)
    if kind == "neg":
        return -_evaluate(node[1], at)
    if kind == "pm":
        return _evaluate(node[2], at) * node[1]
    if kind == "pct":
        return _evaluate(node[1], at) / 100
    if kind == "deg":
        return _combine(_evaluate(node[1], at), context().pi / 180, lambda x, y: x * y)
    if kind == "fn":
        return _call(node[1], [_evaluate(a, at) for a in node[2]], at)
    if kind == "sum":
        return _sum(node, at)
    if kind == "based":
        if node[2] < 2 or any(int(d) >= node[2] for d in node[1]):
            raise NoValue("no such digits in this base")
        return Fraction(int(node[1], node[2])) if node[2] <= 36 else _no_value()
    if kind == "set" and len(node[1]) == 1:
        return _evaluate(node[1][0], at)
    raise NoValue(f"a {kind} is no number")


def _sum(node: Node, at: Point) -> Value:
    """Of at most MAX_SUM terms."""
    _, kind, variable, start, end, term = node
    first, last = _evaluate(start, at), _evaluate(end, at)
    if not all(isinstance(v, Fraction) and v.denominator == 1 for v in (first, last)):
        raise NoValue("the ends of the sum are no integers")
    if last - first > MAX_SUM:
        raise NoValue("too many terms")
    total: Value = Fraction(0 if kind == "sum" else 1)
    for k in range(int(first), int(last) + 1):
        value = _evaluate(term, at.with_fixed(variable[1], Fraction(k)))
        total = _bounded(_combine(total, value, operator.add if kind == "sum" else operator.mul))
    return total


def _no_value() -> Value:
    raise NoValue("no number")


def _constant(name: str, at: Point) -> Value:
    if name in at.fixed:  # the index of a sum
        return at.fixed[name]
    if name in "iI":
        return at.value("i") if at.real_i else context().mpc(0, 1)
    return +context().pi if name == "pi" else +context().e


def _mp(value: Value) -> Value:
    if not isinstance(value, Fraction):
        return value
    mp = context()
    return mp.mpf(value.numerator) / mp.mpf(value.denominator)


def _combine(a: Value, b: Value, operation: Any) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return operation(a, b)
    return operation(_mp(a), _mp(b))


def _bounded(value: Value) -> Value:
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise TooLarge("too many digits")
    return value


def _log2(value: Value) -> float:
    """An estimate of log2 |value|; -inf for 0."""
    if value == 0:
        return -math.inf
    if isinstance(value, Fraction):
        return float(value.numerator.bit_length() - value.denominator.bit_length())
    return float(context().mag(value))


def _power(base: Value, exponent: Value) -> Value:
    if base == 0:
        if exponent == 0:
            return Fraction(1)
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        raise ZeroDivisionError
    mp = context()
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        if exponent.denominator == 1:
            size: Fraction | float = abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length())
            if size > _MAX_BITS and abs(base) != 1:
                raise TooLarge("too large a power")
            return base ** int(exponent) if abs(base) != 1 else Fraction(1 if base == 1 or exponent % 2 == 0 else -1)
        if base > 0 and exponent.denominator <= 64 and (root := _exact_root(base, exponent.denominator)) is not None:
            return _power(root, Fraction(exponent.numerator))
        if base < 0 and exponent.denominator % 2 and exponent.denominator <= 99:
            # The real root of a negative number, as school has it: (-8)^(1/3) = -2.
            return _power(-base, exponent) * (-1 if exponent.numerator % 2 else 1)
    size = abs(_log2(exponent)) if _log2(exponent) > 0 else 0.0
    if size > 40 or abs(mp.mpc(_mp(exponent))) * max(abs(_log2(base)), 1) > _MAX_BITS:
        raise TooLarge("too large a power")
    return mp.power(_mp(base), _mp(exponent))


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    roots = [_integer_root(n, degree) for n in (value.numerator, value.denominator)]
    return None if None in roots else Fraction(*roots)  # type: ignore[arg-type]


def _integer_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
    elif value.bit_length() < 1000:
        root = round(value ** (1 / degree))
    else:
        return None
    return root if root**degree == value else None


def _factorial(value: Value) -> Value:
    if isinstance(value, Fraction):
        if value > MAX_FACTORIAL:
            raise TooLarge("too large a factorial")
        if value.denominator == 1:
            return Fraction(math.factorial(int(value)))
    if _log2(value) > math.log2(MAX_FACTORIAL):
        raise TooLarge("too large a factorial")
    return context().factorial(_mp(value))


def _binomial(n: Value, k: Value) -> Value:
    if max(_log2(n), _log2(k)) > math.log2(MAX_DIGITS):
        raise TooLarge("too large a binomial coefficient")
    if (
        isinstance(n, Fraction)
        and isinstance(k, Fraction)
        and n.denominator == k.denominator == 1
        and n >= 0
        and k >= 0
    ):
        return Fraction(math.comb(int(n), int(k)))
    return context().binomial(_mp(n), _mp(k))


_ANALYTIC = {
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "sech", "csch",
}  # fmt: skip
_INVERSE = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc", "arcsinh": "asinh",
    "arccosh": "acosh", "arctanh": "atanh", "arccoth": "acoth", "arcsech": "asech", "arccsch": "acsch",
}  # fmt: skip


def _call(name: str, args: list[Value], at: Point) -> Value:
    mp = context()
    if name in ("max", "min", "gcd", "lcm"):
        if not all(isinstance(a, (Fraction, mp.mpf)) for a in args):
            raise NoValue("no order among complex numbers")
        if name in ("gcd", "lcm"):
            if not all(isinstance(a, Fraction) and a.denominator == 1 for a in args):
                raise NoValue("not integers")
            return Fraction((math.gcd if name == "gcd" else math.lcm)(*(int(a) for a in args)))
        return (max if name == "max" else min)(args, key=_mp)
    if name == "binom" and len(args) == 2:
        return _binomial(*args)
    if name == "permutations" and len(args) == 2:
        return _combine(_factorial(args[0]), _factorial(_combine(args[0], args[1], operator.sub)), operator.truediv)
    if name == "log" and len(args) == 2:
        return mp.log(_mp(args[0])) / mp.log(_mp(args[1]))
    if name == "arctan2" and len(args) == 2:
        return mp.atan2(_mp(args[0]), _mp(args[1]))
    if name == "beta" and len(args) == 2 and max(map(_log2, args)) < 10:
        return mp.beta(_mp(args[0]), _mp(args[1]))
    if len(args) != 1:
        raise NoValue("not this many arguments")
    value = args[0]
    if name == "factorial":
        return _factorial(value)
    if name in ("gamma", "Gamma"):
        return _factorial(_combine(value, Fraction(1), operator.sub))
    if name == "factorial2":
        if not isinstance(value, Fraction):
            raise NoValue("not an integer")
        if value > MAX_FACTORIAL:
            raise TooLarge("too large a factorial")
        if value.denominator == 1:
            return Fraction(math.prod(range(int(value), 0, -2)))
        # The analytic form agrees with it at all odd integers.
        half = _mp(value) / 2
        return mp.power(2, half + mp.mpf(1) / 2) * mp.gamma(half + 1) / mp.sqrt(mp.pi)
    if name == "abs":
        return abs(value)
    if name in ("floor", "ceil"):
        if isinstance(value, Fraction):
            return Fraction(math.floor(value) if name == "floor" else math.ceil(value))
        if abs(value.imag) > 0:
            raise NoValue("no floor of a complex number")
        if _log2(value) > _BITS - 60:
            raise NoValue("not known to a unit")
        return Fraction(int((mp.floor if name == "floor" else mp.ceil)(value.real)))
    number = _mp(value)
    if name in ("ln", "log"):
        if number == 0:
            raise NoValue("the logarithm of 0")
        return mp.log(number) / mp.log(10) if name == "log" and at.log10 else mp.log(number)
    if name in _ANALYTIC or name in _INVERSE:
        if _log2(number) > 40 or (name.endswith("h") and name in _ANALYTIC and _log2(number) > 13):
            raise TooLarge("too large an argument")
        return getattr(mp, _INVERSE.get(name, name))(number)
    if name == "sinc":
        return mp.sinc(number)
    if name == "zeta" and number.imag == 0 and 1 < number.real < 1000:
        return mp.zeta(number)
    if name == "cis":
        return mp.cos(number) + mp.mpc(0, 1) * mp.sin(number)
    if name in ("Re", "Im"):
        return number.real if name == "Re" else number.imag
    if name == "arg":
        return mp.arg(number)
    if name == "sgn":
        return mp.sign(number)
    raise NoValue(f"the function {name}")


def same_number(a: Value, b: Value) -> bool:
    """Equality: exact between fractions, to 50 digits otherwise."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    mp = context()
    a, b = mp.mpc(_mp(a)), mp.mpc(_mp(b))
    if not (mp.isfinite(a) and mp.isfinite(b)):
        raise NoValue("not finite")
    largest = max(abs(a), abs(b))
    return bool(abs(a - b) <= max(largest * mp.mpf(10) ** -45, mp.mpf(10) ** -50))


def walk(node: Any) -> Iterator[Node]:
    """The node and all nodes in it."""
    stack = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, tuple):
            if item and isinstance(item[0], str):
                yield item
            stack.extend(item)


def replaced(node: Any, old: Node, new: Node) -> Any:
    """The node with `new` for each `old` in it."""
    if node == old:
        return new
    return tuple(replaced(n, old, new) for n in node) if isinstance(node, tuple) else node


def symbols(node: Node) -> frozenset[str]:
    return frozenset(n[1] for n in walk(node) if n[0] == "sym" and len(n) == 2)


def has(node: Node, kind: str, name: str | None = None) -> bool:
    return any(n[0] == kind and (name is None or (len(n) > 1 and n[1] == name)) for n in walk(node))


def literal(node: Node) -> tuple[Fraction, int] | None:
    """A decimal literal, with its sign, power of ten and percent sign, and the number of places that it shows; None for all else."""
    kind = node[0]
    if kind == "num":
        return None if node[2] is None else (node[1], node[2])
    if kind == "neg":
        inner = literal(node[1])
        return None if inner is None else (-inner[0], inner[1])
    if kind == "pct":
        inner = literal(node[1])
        return None if inner is None else (inner[0] / 100, inner[1] + 2)
    if kind == "mul" and node[2][0] == "pow" and node[2][1][:2] == ("num", 10):
        inner, power = literal(node[1]), _integer(node[2][2])
        if inner is not None and power is not None and abs(power) <= 1000:
            return inner[0] * Fraction(10) ** power, inner[1] - power
    return None


def _integer(node: Node) -> int | None:
    if node[0] == "neg":
        inner = _integer(node[1])
        return None if inner is None else -inner
    return int(node[1]) if node[0] == "num" and node[2] is None else None


def rounded(shown: tuple[Fraction, int], value: Value) -> bool:
    """Whether a decimal literal of five significant digits or more is `value`, rounded to the places that it shows."""
    mp = context()
    if isinstance(value, mp.mpc):
        if abs(value.imag) > mp.mpf(10) ** -40:
            return False
        value = value.real
    digits = abs(shown[0]) * Fraction(10) ** shown[1]
    units = abs(_mp(shown[0]) - _mp(value)) * mp.mpf(10) ** shown[1]
    # With seven digits cutting off is as good as rounding.
    return digits >= SHOWN_DIGITS and bool(units <= (mp.mpf("0.5000001") if digits < 10**6 else 1))
