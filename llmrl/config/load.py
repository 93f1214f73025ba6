"""Recipes in and out: YAML with overrides -> a config, and back.

YAML is read by the 1.2 core schema: `2e-6` is a number, `no` and `on` are text, only `true` and `false` are booleans.
A key that stands twice in one mapping is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import yaml

from llmrl.config.base import Recipe, RecipeError
from llmrl.config.dpo import DPOConfig
from llmrl.config.evaluation import EvalConfig
from llmrl.config.fields import field_at, groups, model_at
from llmrl.config.grpo import GRPOConfig
from llmrl.config.ppo import PPOConfig
from llmrl.config.reward_model import RewardConfig
from llmrl.config.sft import SFTConfig
from llmrl.errors import ConfigError

_R = TypeVar("_R", bound=Recipe)
CONFIGS: dict[str, type[Recipe]] = {
    config.kind: config for config in (SFTConfig, RewardConfig, DPOConfig, PPOConfig, GRPOConfig, EvalConfig)
}
_PACKAGE = Path(__file__).resolve().parents[1]
RECIPE_DIRS = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")  # an installed wheel, a checkout

_FLOAT = r"[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.inf|\.nan)$"
_ESCAPED = "\r\x85\u2028\u2029\ufeff"  # line breaks to YAML, lost when written as they are
_RESOLVERS = (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", r"<<$", "<"),
)


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2 (with underscores in numbers and merge keys); no key twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (as PyYAML declares it)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                problem = f"key {key.value!r} stands twice, in lines {seen[key.value]} and {line}; keep one"
                raise yaml.composer.ComposerError(None, None, problem, None)
            seen[key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else; writes text of several lines as a block."""

    def represent_text(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(c in data for c in _ESCAPED) else "|" if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


@overload
def load_recipe(kind: Literal["sft"], path: str | Path | None = None, overrides: Sequence[str] = ()) -> SFTConfig: ...
@overload
def load_recipe(
    kind: Literal["reward"], path: str | Path | None = None, overrides: Sequence[str] = ()
) -> RewardConfig: ...
@overload
def load_recipe(kind: Literal["dpo"], path: str | Path | None = None, overrides: Sequence[str] = ()) -> DPOConfig: ...
@overload
def load_recipe(kind: Literal["ppo"], path: str | Path | None = None, overrides: Sequence[str] = ()) -> PPOConfig: ...
@overload
def load_recipe(kind: Literal["grpo"], path: str | Path | None = None, overrides: Sequence[str] = ()) -> GRPOConfig: ...
@overload
def load_recipe(kind: Literal["eval"], path: str | Path | None = None, overrides: Sequence[str] = ()) -> EvalConfig: ...
@overload
def load_recipe(kind: str, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe: ...
def load_recipe(kind: str, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe (a path, or the name of a shipped one) and applies overrides such as "rewards.0.weight=0.5".

    An override's value is YAML; for a key that takes text it is the text itself (or null). A later override wins.
    Raises ConfigError with everything that is wrong with the recipe at once.
    """
    recipe = CONFIGS[kind]
    file = find_recipe(path) if path is not None else None
    data, lines = _read(file) if file else ({}, {})
    overridden: dict[str, str] = {}
    for override in overrides:
        key, value = _parse_override(recipe, override)
        _assign(recipe, data, key, value, override)
        overridden[".".join(key)] = override
        lines = {k: n for k, n in lines.items() if k != ".".join(key)}
    try:
        return recipe(**data)
    except RecipeError as error:
        problems = [(_place(key, lines, overridden), text) for key, text in error.problems]
        raise RecipeError(problems, str(file or f"{kind} recipe")) from None


def load_file(model: type[_R], file: Path) -> _R:
    """Reads one YAML file into a model. Raises ConfigError with everything that is wrong with it, by line."""
    data, lines = _read(file)
    try:
        return model(**data)
    except RecipeError as error:
        raise RecipeError([(_place(key, lines, {}), text) for key, text in error.problems], str(file)) from None


def dump_recipe(config: Recipe) -> str:
    """The recipe as YAML with every key, in the order of `llmrl <kind> --help`; reloads to an equal config."""
    values = config.model_dump(mode="json")
    ordered = {key: values[key] for _, keys in groups(type(config)) for key in keys}
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name (with or without .yaml) of one that comes with llmrl. Raises ConfigError."""
    for folder in (Path(), *RECIPE_DIRS):
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    shipped = sorted({file.stem for folder in RECIPE_DIRS for file in folder.glob("*.yaml")})
    near = difflib.get_close_matches(Path(name).stem, shipped, n=3, cutoff=0.4) or shipped
    raise ConfigError(f"no recipe {str(name)!r}: not a file, nor the name of a shipped recipe ({', '.join(near)})")


def _read(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The recipe's data, and the line of each dotted key."""
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        data = {} if node is None else loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not a readable recipe: {_yaml_problem(error)}") from None
    if not isinstance(data, dict) or any(not isinstance(key, str) for key in data):
        raise ConfigError(f"{file}: a recipe is a mapping of keys (text) to values, such as `learning_rate: 1e-6`")
    return data, dict(_lines(node)) if node else {}


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    text = ", ".join(
        part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part
    ) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark else text


def _lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, line). An alias stands under several keys and is reported for each; YAML allows no endless nesting here."""
    if isinstance(node, yaml.MappingNode):
        pairs = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(i), value, value) for i, value in enumerate(node.value)]
    else:
        return
    for name, at, value in pairs:
        yield prefix + name, at.start_mark.line + 1
        yield from _lines(value, f"{prefix}{name}.")


def _place(key: str, lines: dict[str, int], overridden: dict[str, str]) -> str:
    """The key with the override that set it, a part of it or what it is part of, else with its line in the file."""
    if key in overridden:
        return f"override {overridden[key]}"
    if inner := [override for name, override in overridden.items() if key and name.startswith(f"{key}.")]:
        return f"override {inner[-1]}: {key}"
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in overridden:
            return f"override {overridden[prefix]}: {key}"
        if prefix in lines:
            return f"line {lines[prefix]}: {key}"
    return key


def _parse_override(recipe: type[Recipe], override: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[\w-]+)*", key):
        example = f"{key.lstrip('-') or 'learning_rate'}={text or 'VALUE'}"
        raise ConfigError(
            f"override {override!r}: write key=value, without dashes or spaces around the equals sign: {example}"
        )
    path = tuple(key.split("."))
    field = field_at(recipe, path)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if field and model_at(recipe, path[:-1]) and field.annotation in (str, str | None) and not quoted:
        return path, None if text in ("", "null", "~") and field.annotation is not str else text
    try:
        return path, yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {_yaml_problem(error)}") from None


def _assign(recipe: type[Recipe], data: Any, path: tuple[str, ...], value: Any, override: str) -> None:
    """Sets data[path], making what is missing on the way; a shorthand on the way is written out first."""
    for i, part in enumerate(path):
        if isinstance(data, list):
            if not part.isdigit() or int(part) > len(data):
                raise ConfigError(
                    f"override {override!r}: {'.'.join(path[:i])} is a list of {len(data)}; write a number from 0 to {len(data)}, not {part!r}"
                )
            index: Any = int(part)
            data.extend([None] * (index + 1 - len(data)))
        elif isinstance(data, dict):
            index = part
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(path[:i])} is {data!r} and has no {part!r} in it")
        if i == len(path) - 1:
            data[index] = value
            return
        child = data[index] if isinstance(data, list) else data.get(index)
        data[index] = data = _opened(recipe, path[: i + 1], child, path[i + 1].isdigit())


def _opened(recipe: type[Recipe], path: tuple[str, ...], value: Any, as_list: bool) -> Any:
    """A value that a key can be set in: nothing becomes empty, `math_answer` becomes {function: math_answer}, one item a list."""
    model = model_at(recipe, path)
    shorthand = getattr(model, "shorthand", "")
    if isinstance(value, str) and shorthand:
        value = {shorthand: value}
    if value is None:
        return [] if as_list else {}
    return [value] if as_list and isinstance(value, dict) and shorthand else value
