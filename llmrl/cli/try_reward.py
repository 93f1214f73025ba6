"""`llmrl try-reward RECIPE --text ANSWER`: a recipe's rewards on answers that you write."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrl.cli.recipe import heading, recipe_kinds
from llmrl.errors import ConfigError

if TYPE_CHECKING:
    from llmrl.types import Prompt, ScoredRollout

KINDS = ("grpo", "ppo", "dpo")
SHOWN_CHARACTERS = 1200


def run(argv: Sequence[str]) -> int:
    """Prints each part of the reward; 0, or 1 when a function failed."""
    parser = argparse.ArgumentParser(
        prog="llmrl try-reward",
        usage="llmrl try-reward RECIPE (--text ANSWER | --file FILE) [--row N | --id ID] [key=value ...]",
        description="Scores an answer with a recipe's rewards, as training would: every part, what happened, and the notes of graders.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a recipe of ppo, grpo or dpo: its file, or the name of a shipped one")
    answer = parser.add_mutually_exclusive_group(required=True)
    answer.add_argument("--text", action="append", help="an answer; may be given several times, as a group")
    answer.add_argument("--file", type=Path, help="a file with one answer")
    row = parser.add_mutually_exclusive_group()
    row.add_argument("--row", type=int, default=1, help="which usable prompt of the recipe's data, from 1")
    row.add_argument("--id", help="the prompt's id")
    args, rest = parser.parse_known_args(list(argv))
    # The first kind that takes it: what rewards and data need means the same to all of them.
    config: Any = recipe_kinds(KINDS, args.recipe, rest, "llmrl try-reward")[0]
    if not config.rewards:
        raise ConfigError("this recipe has no rewards, so there is nothing to try")
    texts = args.text or [_read(args.file)]
    from llmrl.cli.try_rewards import answered, open_rewards
    from llmrl.data.build import build_prompts, rows_of
    from llmrl.models.load import load_skeleton

    _, tokenizer = load_skeleton(config)
    prompt = _chosen(build_prompts(rows_of(config)[0], tokenizer, config)[0], args.row, args.id)
    with open_rewards(config) as runner:
        bad = runner.check_golds([prompt])
        rollouts = [replace(r, index=i) for i, r in enumerate(answered([prompt] * len(texts), texts, tokenizer))]
        scored = runner.score(rollouts)
        weights = dict(zip(runner.names, runner.weights, strict=True))
    report(Console(highlight=False), prompt, scored, weights)
    for item in bad:
        print(f"note: {item.function} can't use this row's reference answer: {item.reason}")
    return int(any(kind not in ("score", "not-applicable") for s in scored for kind in s.outcomes.values()))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {path} can't be read: {error}") from error


def _chosen(prompts: Sequence[Prompt], row: int, name: str | None) -> Prompt:
    if name is not None:
        found = [p for p in prompts if p.id == name]
        if not found:
            raise ConfigError(
                f"no usable prompt has the id {name!r}; the first is {prompts[0].id!r}"
                if prompts
                else "no usable prompt"
            )
        return found[0]
    if not 1 <= row <= len(prompts):
        raise ConfigError(f"--row {row}: the recipe's data has {len(prompts)} usable prompts, from 1")
    return prompts[row - 1]


def report(
    console: Console,
    prompt: Prompt,
    scored: Sequence[ScoredRollout],
    weights: Mapping[str, float],
) -> None:
    """A table an answer: value and outcome of each reward, its weight at step 0, its milliseconds and its note; then further columns."""
    heading(console, f"Prompt {prompt.id}")
    console.print(Text(str(prompt.text)[:SHOWN_CHARACTERS], style="dim"))
    for item in scored:
        text = item.rollout.completion.text
        console.print(Text(f"\nanswer {item.rollout.index + 1}: {text[:SHOWN_CHARACTERS]!r}", style="bold"))
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("reward", "value", "weight", "outcome", "ms", "note"):
            table.add_column(column, justify="right" if column in ("value", "weight", "ms") else "left")
        for name, value in item.parts.items():
            milliseconds = f"{1000 * item.seconds[name]:.1f}" if name in item.seconds else ""
            note = Text(item.notes.get(name, ""))
            table.add_row(name, _number(value), f"{weights[name]:g}", item.outcomes[name], milliseconds, note)
        table.add_row("all", _number(item.reward), style="bold")
        console.print(table)
        for name, note in item.extra.items():
            if note is not None:
                console.print(Text(f"{name}: {note}", style="dim"))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
