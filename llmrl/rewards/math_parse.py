r"""A parser for final answers: LaTeX, calculator notation and mixtures of both, to a small tree.

Nodes are tuples whose first item is the kind:
    ("num", Fraction, places): a literal; places: digits after the point, None for an integer
    ("sym", name), ("const", "pi" | "e" | "i"), ("inf",), ("empty",), ("all", "R" | "Z" | ...)
    ("add", a, b), ("mul", a, b), ("div", a, b), ("pow", a, b), ("neg", a), ("pm", sign, a), ("deg", a), ("pct", a)
    ("fn", name, args), ("based", digits, base), ("ratio", items)
    ("seq" | "or" | "and" | "set", items), ("tuple", opening, closing, items), ("matrix", rows)
    ("cases", rows of a value and a condition), ("otherwise",)
    ("rel", sides, signs), ("in", element, set), ("cup" | "cap" | "setminus", a, b)
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from llmrl.rewards.math_names import (
    ALIASES,
    CALLED,
    CLOSERS,
    FUNCTIONS,
    GREEK,
    PLAIN_NAMES,
    PLUS,
    RELATIONS,
    SETS,
    SPECIAL,
    STOPS,
    is_word,
)

Node = tuple[Any, ...]
MAX_CHARACTERS, MAX_DEPTH = 2_000, 60

_NUMBER = re.compile(r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+")
_PLAIN_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_EXPONENT = re.compile(r"[eE]([+-]?\d{1,4})(?![\d.A-Za-z])")


class NotRead(Exception):
    """The text is no answer that this parser knows."""


def parse(text: str, *, thousands: bool = True, special: bool = False, nested: bool = False) -> Node:
    """The tree of a cleaned text (`math_clean.clean`). Three signs can be read in two ways.

    thousands: "1,234" outside brackets is one number. special: gamma(5) and the like are functions, and no products. nested: of the
    bars in "|x+b|y||", those before a letter or a digit open.

    Raises NotRead. Time is linear in the text but for a constant of the nesting, which is bounded.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotRead("too long")
    parser = _Parser(text, thousands, special, nested)
    node = parser.answer()
    if parser.peek():
        raise NotRead(f"stopped at {parser.peek()!r}")
    return node


class _Parser:
    def __init__(self, text: str, thousands: bool, special: bool, nested: bool) -> None:
        self.s, self.i, self.thousands, self.special, self.nested = text, 0, thousands, special, nested
        self.depth = self.brackets = self.bars = 0

    def peek(self) -> str:
        """The next token, not consumed: a command, a number's first digit, a letter, a sign; "" at the end."""
        s, i = self.s, self.i
        while i < len(s) and s[i].isspace():
            i += 1
        self.i = i
        if i >= len(s):
            return ""
        if s[i] != "\\":
            return s[i]
        end = i + 1
        while end < len(s) and s[end].isalpha() and s[end].isascii():
            end += 1
        return s[i : max(end, i + 2)]

    def take(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.i += len(token)
        return True

    def expect(self, *tokens: str) -> str:
        for token in tokens:
            if self.take(token):
                return token
        raise NotRead(f"expected {' or '.join(tokens)}")

    def answer(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotRead("nested too deeply")
        items = [self.conjunction()]
        while self.take(r"\lor") or self.take(";"):
            if self.peek() == "":
                break
            items.append(self.conjunction())
        self.depth -= 1
        return items[0] if len(items) == 1 else _list("or", items)

    def conjunction(self) -> Node:
        items = [self.sequence()]
        while self.take(r"\land"):
            items.append(self.sequence())
        return items[0] if len(items) == 1 else _list("and", items)

    def sequence(self) -> Node:
        items = [self.relation()]
        while self.take(","):
            if self.peek() in ("", r"\lor", r"\land"):
                break  # "1, 2, and 3"
            items.append(self.relation())
        return items[0] if len(items) == 1 else ("seq", tuple(items))

    def relation(self) -> Node:
        sides, signs = [self.sets()], []
        while (sign := RELATIONS.get(self.peek())) is not None:
            self.i += len(self.peek())
            if self.s[: self.i].endswith("approx") and sides[-1][0] != "sym":
                self.sets()  # the exact value counts
                continue
            if sign in "<>" and self.take("="):
                sign += "="
            if sign == "=" and self.peek() in ("<", ">"):
                sign = self.expect("<", ">") + "="
            signs.append(sign)
            sides.append(self.sets())
        if not signs:
            return sides[0]
        if "in" in signs:
            if len(signs) != 1 or sides[1][0] == "num":
                raise NotRead('a chain with \\in, or "12 in 4"')
            return ("in", sides[0], sides[1])
        return ("rel", tuple(sides), tuple(signs))

    def sets(self) -> Node:
        node = self.ratio()
        while (kind := SETS.get(self.peek())) is not None:
            self.i += len(self.peek())
            node = (kind, node, self.ratio())
        return node

    def ratio(self) -> Node:
        items = [self.sum()]
        while self.bars >= 0 and self.take(":"):
            items.append(self.sum())
        return items[0] if len(items) == 1 else ("ratio", tuple(items))

    def sum(self) -> Node:
        node = self.product()
        while (sign := self.peek()) in PLUS:
            self.i += len(sign)
            term = self.product()
            if sign == "-":
                term = ("neg", term)
            elif sign != "+":
                term = ("pm", 1 if sign == r"\pm" else -1, term)
            node = ("add", node, term)
        return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            token = self.peek()
            if token in ("*", r"\times", r"\cdot"):
                self.i += len(token)
                node = ("mul", node, self.signed())
            elif token == "/":
                self.i += 1
                node = ("div", node, self.signed())
            elif self.starts_atom(token):
                node = self.juxtaposed(node, token)
            else:
                return node

    def juxtaposed(self, node: Node, token: str) -> Node:
        """A product without a sign; an integer before a proper fraction is a mixed number."""
        if node[0] == "neg" and node[1][0] == "num":
            return ("neg", self.juxtaposed(node[1], token))
        if node[0] == "num" and node[2] is None:
            if token == r"\frac":
                after = self.power()
                if _proper(after):
                    return ("add", node, after)
                if after[0] in ("pct", "deg") and _proper(after[1]):
                    return (after[0], ("add", node, after[1]))
                return ("mul", node, after)
            if token.isdigit():
                found = re.compile(r"(\d+)\s*/\s*(\d+)(?![\d.])").match(self.s, self.i)
                if found and int(found[1][:9]) < int(found[2][:9]):
                    self.i = found.end()
                    return ("add", node, _fraction(int(found[1]), int(found[2])))
                raise NotRead("two numbers side by side")
        if (
            (token.isdigit() or token == ".")
            and self.s[: self.i][-1:] not in (" ", "!")
            and not (self.s[: self.i].endswith(")") and node[0] in ("add", "mul"))
        ):
            raise NotRead("a number after a factor")
        return ("mul", node, self.power())

    def starts_atom(self, token: str) -> bool:
        if not token:
            return False
        if token[0] == "\\":
            return token not in STOPS
        if token == "|":
            return self.bars == 0 or (self.nested and bool(re.match(r"[\w(\\]", self.s[self.i + 1 : self.i + 2])))
        return token.isalnum() or token in "([{."

    def signed(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotRead("nested too deeply")
        token = self.peek()
        if token in PLUS:
            self.i += len(token)
            inner = self.signed()
            node: Node = inner
            if token == "-":
                node = ("neg", inner)
            elif token != "+":
                node = ("pm", 1 if token == r"\pm" else -1, inner)
        else:
            node = self.power()
        self.depth -= 1
        return node

    def power(self) -> Node:
        node = self.postfix(self.atom())
        while True:
            if self.take("^"):
                token = self.peek()
                if token == r"\circ" or re.compile(r"\{\s*\\circ\s*\}").match(self.s, self.i):
                    self.i = self.s.index(r"\circ", self.i) + 5
                    if token == "{":
                        self.expect("}")
                    self.take("C") or self.take("F")
                    node = ("deg", node)
                    continue
                found = re.compile(r"\{?\s*(?:\\prime\s*)+\}?").match(self.s, self.i)
                if found and node[0] == "sym":
                    self.i = found.end()
                    node = ("sym", node[1] + "'" * found[0].count("prime"))
                    continue
                node = self.postfix(("pow", node, self.exponent()))
            elif node[0] == "sym" and self.peek() == "'":
                self.i += 1
                node = ("sym", node[1] + "'")
            else:
                return node

    def exponent(self) -> Node:
        """What stands after ^: a group, a signed number or name; 2^-3, 2^10, 2^x^2 (to the right)."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotRead("nested too deeply")
        token = self.peek()
        if token in ("-", "+"):
            self.i += 1
            inner = self.exponent()
            node = ("neg", inner) if token == "-" else inner
        else:
            node = self.atom()
            if token != "{":
                node = self.postfix(node)  # 2^4! is 2^(4!)
            if self.take("^"):
                node = ("pow", node, self.exponent())
        self.depth -= 1
        return node

    def postfix(self, node: Node) -> Node:
        while True:
            token = self.peek()
            if token == "!" and self.s[self.i + 1 : self.i + 2] != "=":
                self.i += 1
                double = self.s[self.i : self.i + 1] == "!"
                self.i += double
                node = ("fn", "factorial2" if double else "factorial", (node,))
            elif token == "%":
                self.i += 1
                node = ("pct", node)
            else:
                return node

    def atom(self) -> Node:
        token = self.peek()
        if token.isdigit() or (token == "." and self.s[self.i + 1 : self.i + 2].isdigit()):
            return self.number()
        if token and token in "([":
            return self.bracketed(token)
        if token == "{":
            return self.braces(token)
        if token == "|":
            self.i += 1
            bars, self.bars = self.bars, 1
            inner = self.sum()
            self.expect("|")
            self.bars = bars
            return ("fn", "abs", (inner,))
        if token.startswith("\\"):
            from llmrl.rewards.math_latex import command

            return command(self, token)
        if token.isascii() and token.isalpha():
            return self.letters()
        raise NotRead(f"unexpected {token!r}")

    def number(self) -> Node:
        pattern = _NUMBER if self.thousands and not self.brackets else _PLAIN_NUMBER
        found = pattern.match(self.s, self.i)
        if found is None:
            raise NotRead("no number")
        digits = found[0].replace(",", "")
        if len(digits) > 1000:
            raise NotRead("too many digits")
        self.i = found.end()
        if (based := re.compile(r"_\{?\s*\(?(\d{1,2})\)?\s*\}?").match(self.s, self.i)) and "." not in digits:
            self.i = based.end()
            return ("based", digits.lstrip("0") or "0", int(based[1]))
        value = Fraction(digits)
        places = len(digits.partition(".")[2]) if "." in digits else None
        if places == 0 and found[0].endswith("."):
            places = None
        dots = re.compile(r"\s*(?:\.\.\.|\\(?:ldots|dots|cdots)(?![A-Za-z]))").match(self.s, self.i) if places else None
        if dots is not None:
            cycle = re.search(r"(\d{1,6}?)\1+$", digits)
            if cycle is None or len(cycle[0]) > (places or 0):
                raise NotRead("digits that go on, nobody knows how")
            self.i = dots.end()
            return ("num", value + Fraction(int(cycle[1]), 10 ** (places or 0) * (10 ** len(cycle[1]) - 1)), None)
        if places is not None and (
            again := re.compile(r"\\(?:overline|bar|dot)\s*\{?\s*(\d{1,40})\s*\}?|\((\d{1,40})\)(?![\d(])").match(
                self.s, self.i
            )
        ):
            period = again[1] or again[2]
            self.i = again.end()
            return ("num", value + Fraction(int(period), 10**places * (10 ** len(period) - 1)), None)
        if (
            places is None
            and found[0].endswith(".")
            and (again := re.compile(r"(?:\\(?:overline|bar)\{|\()(\d{1,40})[})]").match(self.s, self.i))
        ):
            self.i = again.end()
            return ("num", value + Fraction(int(again[1]), 10 ** len(again[1]) - 1), None)
        scientific = _EXPONENT.match(self.s, self.i)
        if scientific:
            self.i = scientific.end()
            power = int(scientific[1])
            if abs(power) > 1000:
                raise NotRead("too large an exponent")
            return ("num", value * Fraction(10) ** power, (places or 0) - power)
        return ("num", value, places)

    def bracketed(self, token: str) -> Node:
        self.i += len(token)
        bars, self.bars = self.bars, 0
        self.brackets += 1
        if self.take(")"):
            raise NotRead("an empty bracket")
        inner = self.answer()
        closing = self.expect(*CLOSERS[token])
        self.brackets -= 1
        self.bars = bars
        if inner[0] == "seq" or (inner[0] == "or" and self.s[self.i - 1] in ")]" and ";" in self.s):  # (1; 2)
            return ("tuple", "(" if token == r"\langle" else token, ")" if closing == r"\rangle" else closing, inner[1])
        if token == "[" and inner[0] == "tuple":
            return ("tuple", "[", "]", (inner,))
        return inner

    def braces(self, token: str, *, call: bool = False) -> Node:
        r"""`{...}` groups, and is a set where it holds several things; `\{...\}` is always a set, by a list or by a condition."""
        self.i += len(token)
        end = "}" if token == "{" else r"\}"
        if self.take(end):
            return ("empty",)
        bars, self.bars = self.bars, -1 if token == r"\{" and not call else 0
        brackets, self.brackets = self.brackets, self.brackets + 1 if token == r"\{" else self.brackets
        inner = self.answer()
        if self.take(r"\mid") or (token == r"\{" and (self.take("|") or self.take(":"))):
            condition = self.answer()
            self.expect(end)
            self.bars, self.brackets = bars, brackets
            return ("such", inner, condition)
        self.expect(end)
        self.bars, self.brackets = bars, brackets
        if inner[0] in ("seq", "or", "and"):
            return ("set", inner[1])
        return ("set", (inner,)) if token == r"\{" else inner

    def letters(self) -> Node:
        """A run of letters: names of functions and constants in it are found, the rest are symbols of one letter each."""
        run = re.compile(r"[A-Za-z]+").match(self.s, self.i)
        assert run is not None
        before, after = self.s[: self.i][-1:], self.s[run.end() : run.end() + 1]
        alone = before in ("", " ") and after in ("", " ", ",", ".")
        if not before.isalpha() and is_word(run[0], alone=alone):
            raise NotRead(f"the word {run[0]!r}")
        if after == "(" and (run[0] in CALLED or (self.special and run[0] in SPECIAL)):
            self.i += len(run[0])
            return self.named(run[0])
        if run[0] in GREEK:
            self.i += len(run[0])
            return self.subscripted(("sym", run[0]))
        for name in PLAIN_NAMES:
            if run[0].startswith(name):
                self.i += len(name)
                return self.named(name)
        if value := re.compile(r"[fghFGHIPQ](\(-?\d+(?:\.\d+)?\))").match(self.s, self.i):
            self.i = value.end()
            return ("sym", value[0])  # f(0) is a value, and no multiple of 0
        self.i += 1
        return self.subscripted(("const", run[0][0]) if run[0][0] in "eiI" else ("sym", run[0][0]))

    def named(self, name: str) -> Node:
        if name == "pi":
            return ("const", "pi")
        if name not in FUNCTIONS and name not in CALLED and not (self.special and name in SPECIAL):
            return self.subscripted(("sym", name))
        from llmrl.rewards.math_calls import call

        return call(self, ALIASES.get(name, name))

    def subscripted(self, node: Node) -> Node:
        """Subscripts are part of a name; nothing is computed in them."""
        found = re.compile(r"\s*_\s*(?:\{([^{}]{1,40})\}|([A-Za-z0-9]+|\\[a-zA-Z]+))").match(self.s, self.i)
        if found is None and node[0] == "sym" and "\\" not in self.s:
            found = re.compile(r"(\d{1,2})()(?![\d.])").match(self.s, self.i)  # v0
        if found is None:
            return node
        self.i = found.end()
        return ("sym", node[1] + "_" + re.sub(r"[\s{}]|\\text", "", found[1] or found[2]))

    def single(self) -> Node:
        """A LaTeX argument: a group, or one character."""
        token = self.peek()
        if token == "{":
            return self.braces(token)
        if token.isdigit():
            self.i += 1
            return ("num", Fraction(int(token)), None)
        return self.atom()


def _list(kind: str, items: list[Node]) -> Node:
    """Items joined by "or" or "and"; with commas among them, "1, 2 and 3", a sequence."""
    if any(i[0] == "seq" and all(e[0] not in ("rel", "in") for e in i[1]) for i in items):
        return ("seq", tuple(e for i in items for e in (i[1] if i[0] == "seq" else (i,))))
    return (kind, tuple(items))


def _fraction(p: int, q: int) -> Node:
    return ("div", ("num", Fraction(p), None), ("num", Fraction(q), None))


def _proper(node: Node) -> bool:
    return (
        node[0] == "div"
        and node[1][0] == node[2][0] == "num"
        and node[1][2] is None
        and node[2][2] is None
        and 0 < node[1][1] < node[2][1]
    )
