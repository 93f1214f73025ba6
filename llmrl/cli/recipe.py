"""What the commands that take a recipe share: `--config FILE key=value ...` and the list of keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, overload

from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrl.config.base import Recipe, RecipeError, Strict
from llmrl.config.dpo import DPOConfig
from llmrl.config.explain import show
from llmrl.config.fields import Field, Model, describe, groups, sub_model
from llmrl.config.grpo import GRPOConfig
from llmrl.config.load import CONFIGS, load_recipe
from llmrl.config.ppo import PPOConfig
from llmrl.config.presets import GRPO_PRESETS, PPO_PRESETS
from llmrl.config.reward_model import RewardConfig
from llmrl.config.sft import SFTConfig
from llmrl.errors import ConfigError

_EXAMPLES = {
    "sft": "learning_rate=2e-5 dataset.0.split=test lora.r=8",
    "reward": "learning_rate=5e-6 dataset.0.split=train_prefs eval_fraction=0.02",
    "dpo": "beta=0.05 loss_type=[sigmoid,nll] loss_weights=[1,0.2]",
    "ppo": "preset=orz_ppo critic=separate rewards.0.weight=0.5",
    "grpo": "learning_rate=2e-6 rewards.0.weight=0.5 lora.r=8",
    "eval": "temperature=0.7 data.0.columns.prompt=question",
}
_PRESETS = {"grpo": GRPO_PRESETS, "ppo": PPO_PRESETS}
_NEEDS = {"dataset": "rows to train on", "rewards": "a reward function or a reward model"}


def wants_help(argv: Sequence[str]) -> bool:
    return any(arg in ("-h", "--help") for arg in argv)


@overload
def read_recipe(kind: Literal["sft"], argv: Sequence[str]) -> SFTConfig: ...
@overload
def read_recipe(kind: Literal["reward"], argv: Sequence[str]) -> RewardConfig: ...
@overload
def read_recipe(kind: Literal["dpo"], argv: Sequence[str]) -> DPOConfig: ...
@overload
def read_recipe(kind: Literal["ppo"], argv: Sequence[str]) -> PPOConfig: ...
@overload
def read_recipe(kind: Literal["grpo"], argv: Sequence[str]) -> GRPOConfig: ...
@overload
def read_recipe(kind: str, argv: Sequence[str]) -> Recipe: ...
def read_recipe(kind: str, argv: Sequence[str]) -> Recipe:
    """`--config FILE` (or `--config=FILE`) and overrides, in any order -> a config that has data and, for PPO and GRPO, rewards.

    DPO without rewards is offline: its rows are pairs.
    """
    path, overrides = split_config(argv)
    config = load_recipe(kind, path, overrides)
    for key, what in _NEEDS.items():
        if key in type(config).model_fields and not getattr(config, key) and (key, kind) != ("rewards", "dpo"):
            raise ConfigError(f"{path or f'{kind} recipe'}: {key} is empty: {kind} needs {what}")
    return config


def recipe_kinds(kinds: Sequence[str], recipe: str, overrides: Sequence[str], command: str) -> list[Recipe]:
    """The recipe as each kind of trainer, of `kinds`, that takes it.

    Raises ConfigError where none does, with the shortest list of what is wrong. `command` is named in errors.
    """
    if recipe in CONFIGS and overrides:
        raise ConfigError(f"the recipe is all that is needed: {command} RECIPE ..., without {recipe}")
    taken: list[Recipe] = []
    refused: list[ConfigError] = []
    for kind in kinds:
        try:
            taken.append(read_recipe(kind, ["--config", recipe, *overrides]))
        except ConfigError as error:
            refused.append(error)
    if not taken:
        raise min(refused, key=lambda error: len(error.problems) if isinstance(error, RecipeError) else math.inf)
    return taken


def split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Takes `--config FILE` out of the arguments; the rest are overrides."""
    path: str | None = None
    rest = []
    args = iter(argv)
    for arg in args:
        name, equals, value = arg.partition("=")
        if name not in ("--config", "-c"):
            rest.append(arg)
            continue
        if path is not None:
            raise ConfigError("--config stands twice; one recipe a run")
        path = value if equals else next(args, None)
        if not path or path.startswith("-"):
            raise ConfigError("--config needs a recipe: --config recipes/x.yaml")
    return path, rest


def print_keys(kind: str) -> None:
    """`llmrl <kind> --help`: every key of the recipe, with its default and what it means."""
    recipe = CONFIGS[kind]
    print(f"usage: llmrl {kind} --config RECIPE [key=value ...]\n\n{recipe.__doc__}\n")
    print(
        "RECIPE is a YAML file or the name of a shipped recipe. An override is a dotted key and a YAML value, for example"
    )
    print(f"  llmrl {kind} --config recipes/x.yaml {_EXAMPLES[kind]}")
    if kind != "eval":
        print(
            "\nSeveral processes, as a launch file of accelerate says (single, ddp, fsdp2, zero2, zero3, multi_node, or a path; docs/cluster.md):"
        )
        print(f"  llmrl {kind} --accelerate fsdp2 [--num_processes N] --config recipes/x.yaml")
    console = Console(highlight=False)
    shown: set[Model] = set()
    for title, keys in groups(recipe):
        console.print(f"\n[bold]{title}[/bold]")
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column(ratio=1, overflow="fold")
        for key in keys:
            for name, field in _with_inner(key, recipe.model_fields[key], shown):
                text = field.description or ""
                detail = f"{describe(field)}; {_default(field)}"
                table.add_row(Text(name), Text.assemble(text, " " if text else "", (f"[{detail}]", "dim")))
        console.print(table)
    if kind in _PRESETS:
        _print_presets(console, kind, _PRESETS[kind])


def _with_inner(key: str, field: Field, shown: set[Model]) -> Iterator[tuple[str, Field]]:
    """The key, then the keys of the model in it and of those in that, the first time that a model comes up."""
    yield key, field
    model, in_list = sub_model(field.annotation)
    if model and model not in shown:
        shown.add(model)
        for name, inner in model.model_fields.items():
            for deeper, its_field in _with_inner(f".{'N.' if in_list else ''}{name}", inner, shown):
                yield f"  {deeper}", its_field


def _default(field: Field) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    return "default: its own defaults" if isinstance(value, Strict) else f"default {show_plain(value)}"


def show_plain(value: object) -> str:
    return str(value) if isinstance(value, str) else show(value).removesuffix(" (a list)").removesuffix(" (a mapping)")


def _print_presets(console: Console, kind: str, presets: Mapping[str, Mapping[str, object]]) -> None:
    """The kind's own preset in full, the others by what they change of it."""
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 2))
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    base = presets[kind]
    for name, values in presets.items():
        shown = {axis: value for axis, value in values.items() if name == kind or value != base[axis]}
        table.add_row(name, Text(", ".join(f"{axis}: {show_plain(value)}" for axis, value in shown.items())))
    console.print(f"\n[bold]Presets[/bold]: {kind} in full, the others by what is different")
    console.print(table)


def heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold cyan"))
