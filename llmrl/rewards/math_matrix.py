r"""Sums, multiples, products and transposes of matrices and vectors as the matrices that they are."""

from __future__ import annotations

import functools
from collections.abc import Callable

from llmrl.rewards.math_parse import Node

MAX_SIDE = 12
Rows = tuple[tuple[Node, ...], ...]


def computed(node: Node) -> Node:
    """The node with the operations on its matrices done, element by element, as far as their shapes allow; other nodes as they are."""
    kind = node[0]
    if kind == "neg" and (rows := _rows(computed(node[1]))) is not None:
        return _matrix(rows, lambda e: ("neg", e))
    if kind == "pow" and node[2] == ("sym", "T") and (rows := _rows(computed(node[1]))) is not None:
        return ("matrix", tuple(zip(*rows, strict=True)))
    if kind not in ("add", "mul", "div"):
        return node
    a, b = computed(node[1]), computed(node[2])
    left, right = _rows(a), _rows(b)
    if left is None and right is None:
        return node
    if kind == "mul" and right is not None and left is None and a[0] != "tuple":
        return _matrix(right, lambda e: ("mul", a, e))
    if kind in ("mul", "div") and left is not None and right is None and b[0] != "tuple":
        return _matrix(left, lambda e: (kind, e, b))
    if left is None or right is None or max(len(left), len(right), len(left[0]), len(right[0])) > MAX_SIDE:
        return node
    if kind == "add" and [len(r) for r in left] == [len(r) for r in right]:
        return ("matrix", tuple(tuple(("add", x, y) for x, y in zip(r, s, strict=True)) for r, s in zip(left, right, strict=True)))  # fmt: skip
    if kind == "mul" and len(left[0]) == len(right):
        return ("matrix", tuple(tuple(_dot(row, column) for column in zip(*right, strict=True)) for row in left))
    return node


def _rows(node: Node) -> Rows | None:
    return node[1] if node[0] == "matrix" else None


def _matrix(rows: Rows, change: Callable[[Node], Node]) -> Node:
    return ("matrix", tuple(tuple(change(e) for e in row) for row in rows))


def _dot(row: tuple[Node, ...], column: tuple[Node, ...]) -> Node:
    return functools.reduce(lambda a, b: ("add", a, b), (("mul", x, y) for x, y in zip(row, column, strict=True)))
