"""The keys of a recipe, read off its model: where each stands, what it takes, what it means."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmrl.config.base import Recipe, Strict

Model = type[BaseModel]
Field = FieldInfo
Path = tuple[str | int, ...]
_SYMBOLS = ((annotated_types.Ge, "ge", ">="), (annotated_types.Gt, "gt", ">"),
            (annotated_types.Le, "le", "<="), (annotated_types.Lt, "lt", "<"))  # fmt: skip
_NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    dict: "a mapping",
    Any: "anything",
}


def sub_model(annotation: Any) -> tuple[Model | None, bool]:
    """The model inside an annotation (optional, list or plain), and whether it is in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for arg in get_args(annotation):
        model, in_list = sub_model(arg)
        if model:
            return model, in_list or get_origin(annotation) is list
    return None, False


def model_at(recipe: Model, path: Path) -> Model | None:
    """The model whose keys stand at a path such as ("rewards", 0), None where anything goes."""
    model: Model | None = recipe
    for part in path:
        if isinstance(part, int) or str(part).isdigit():
            continue
        if model is None or part not in model.model_fields:
            return None
        model = sub_model(model.model_fields[str(part)].annotation)[0]
    return model


def field_at(recipe: Model, path: Path) -> FieldInfo | None:
    """The field that a path such as ("rewards", 0, "weight") names, or the innermost one around it."""
    for end in range(len(path), 0, -1):
        parent = model_at(recipe, path[: end - 1])
        if parent and path[end - 1] in parent.model_fields:
            return parent.model_fields[str(path[end - 1])]
    return None


def all_keys(model: Model, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of a recipe and of the models in it; an item of a list is written as 0."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        inner, in_list = sub_model(field.annotation)
        if inner:
            yield from all_keys(inner, f"{prefix}{name}.0." if in_list else f"{prefix}{name}.")


def describe(field: FieldInfo) -> str:
    """What a key takes: "a number > 0, or null"."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: list[Any]) -> str:
    bounds = " and ".join(
        f"{sign} {getattr(m, attr)}" for kind, attr, sign in _SYMBOLS for m in metadata if isinstance(m, kind)
    )
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(args[0], [*args[1:], *metadata])
    if origin in (Union, types.UnionType):
        return ", or ".join(_describe(arg, metadata if arg in (int, float) else []) for arg in args)
    if origin is Literal:
        return " | ".join(map(str, args))
    model, in_list = sub_model(annotation)
    if model and in_list:
        short = getattr(model, "shorthand", "")
        return f"a {short}, or a list of mappings with {short}, ..." if short else "a list of mappings"
    if model:
        return f"a mapping with {', '.join(model.model_fields)}"
    if origin is list:
        return f"a list of {_describe(args[0], [])}"
    if origin is dict:
        return "a mapping"
    return f"{_NAMES.get(annotation, str(annotation))} {bounds}".strip()


def groups(recipe: type[Recipe]) -> list[tuple[str, list[str]]]:
    """(title, keys) for the parts that a recipe is made of; the recipe's own keys come last.

    A key whose default a recipe changes stays with the part that it came from.
    """
    parts = [c for c in recipe.__mro__ if issubclass(c, Strict) and c not in (Recipe, Strict, recipe)] + [recipe]
    out, seen = [], set()
    for part in parts:
        keys = [k for k in part.model_fields if k not in seen]
        seen.update(keys)
        title = part.__doc__ or part.__name__ if part is not recipe else recipe.kind.upper()
        out.append((title.strip().rstrip("."), keys))
    return out
