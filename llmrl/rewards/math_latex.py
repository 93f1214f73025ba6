r"""The LaTeX commands of the answer parser: fractions, roots, binomials, matrices, delimiters, names."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from llmrl.rewards.math_calls import big_operator, call
from llmrl.rewards.math_names import ALIASES, DECORATIONS, FUNCTIONS, GREEK
from llmrl.rewards.math_parse import Node, NotRead

if TYPE_CHECKING:
    from llmrl.rewards.math_parse import _Parser

_MATRICES = {"pmatrix", "bmatrix", "matrix", "Bmatrix", "vmatrix", "array", "smallmatrix"}
_SYSTEMS = {"cases", "array", "aligned", "gathered"}


def command(p: _Parser, token: str) -> Node:
    """The node that begins with the command `token`, which is next in the text. Raises NotRead."""
    name = token[1:]
    if name == "{":
        return p.braces(token)
    if name == "langle":
        return p.bracketed(token)
    p.i += len(token)
    if name == "frac":
        return ("div", p.single(), p.single())
    if name == "sqrt":
        return _root(p)
    if name == "binom":
        return ("fn", "binom", (p.single(), p.single()))
    if name in ("lfloor", "lceil"):
        inner = p.sum()
        p.expect("\\r" + name[1:])
        return ("fn", "floor" if name == "lfloor" else "ceil", (inner,))
    if name == "|":
        raise NotRead("a norm")
    if name == "begin":
        return _matrix(p)
    if name == "mathbb":
        found = re.compile(r"\s*\{?\s*([RZNQC])\s*\}?(?:\s*\^?\s*([+-]))?(?![A-Za-z^_])").match(p.s, p.i)
        if found is None:
            raise NotRead("an unknown set")
        p.i = found.end()
        return ("all", found[1] + (found[2] or ""))
    if name in ("mathfrak", "mathcal", "mathscr"):
        return _decorated(p, name)
    if name in ("Reals", "Naturals", "Integers"):
        return ("all", {"Reals": "R", "Naturals": "N", "Integers": "Z"}[name])
    if name == "pi":
        return p.subscripted(("const", "pi")) if p.s[p.i : p.i + 1] == "_" else ("const", "pi")
    if name == "infty":
        return ("inf",)
    if name == "emptyset":
        return ("empty",)
    if name == "i":
        return ("const", "i")
    if name == "boxed":
        return p.single()
    if name == "operatorname":
        raise NotRead("an unknown operator")
    if name in ("sum", "prod"):
        return big_operator(p, name)
    if name in FUNCTIONS or (name == "Gamma" and p.special and p.peek() == "("):
        return call(p, ALIASES.get(name, name))
    if name in GREEK:
        return p.subscripted(("sym", name))
    if name in DECORATIONS:
        return _decorated(p, name)
    raise NotRead(f"the command {token}")


def _root(p: _Parser) -> Node:
    degree: Node = ("num", Fraction(2), None)
    if p.peek() == "[":
        p.i += 1
        degree = p.sum()
        p.expect("]")
    inner = p.single() if p.peek() == "{" else p.atom()
    return ("pow", inner, ("div", ("num", Fraction(1), None), degree))


def _decorated(p: _Parser, name: str) -> Node:
    r"""\vec{v}, \overline{AB}, \angle ABC: a name of its own."""
    found = re.compile(r"\s*(?:\{([^{}]{1,40})\}|([A-Za-z]+))").match(p.s, p.i)
    if found is None:
        raise NotRead(f"\\{name} of nothing")
    p.i = found.end()
    return p.subscripted(("sym", name + ":" + re.sub(r"\s", "", found[1] or found[2])))


def _condition(p: _Parser) -> Node:
    """What stands right of & in cases: an inequality, or "otherwise"."""
    found = re.compile(r"\s*(?:(?:otherwise|else)(?![A-Za-z])|(?:if|for|when) )").match(p.s, p.i)
    if found is not None:
        p.i = found.end()
        if found[0].strip() in ("otherwise", "else"):
            return ("otherwise",)
    return p.conjunction()


def _matrix(p: _Parser) -> Node:
    found = re.compile(r"\s*\{(\w+)\*?\}").match(p.s, p.i)
    if found is None or found[1] not in _MATRICES | _SYSTEMS:
        raise NotRead("an environment that is no matrix")
    p.i = found.end()
    rows: list[tuple[Node, ...]] = []
    row: list[Node] = []
    brackets, p.brackets = p.brackets, p.brackets + 1
    cases = found[1] == "cases"
    while True:
        row.append(_condition(p) if cases and row else p.relation())
        if cases:
            p.take(",") or p.take(".")
        if p.take("&"):
            continue
        if p.take("\\\\"):
            rows.append(tuple(row))
            row = []
            if p.peek() != r"\end":
                continue
        p.expect(r"\end")
        break
    if row:
        rows.append(tuple(row))
    closing = re.compile(r"\s*\{" + found[1] + r"\*?\}").match(p.s, p.i)
    if closing is None or len({len(r) for r in rows}) != 1:
        raise NotRead("a matrix that is not rectangular")
    p.i, p.brackets = closing.end(), brackets
    if found[1] in _SYSTEMS and len(rows[0]) == 1 and all(r[0][0] == "rel" for r in rows):
        return ("seq", tuple(r[0] for r in rows))
    if cases and len(rows[0]) == 2:
        return ("cases", tuple(rows))
    if found[1] not in _MATRICES:
        raise NotRead("an environment that is no system of equations")
    return ("fn", "det", (("matrix", tuple(rows)),)) if found[1] == "vmatrix" else ("matrix", tuple(rows))
