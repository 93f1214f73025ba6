"""`llmrl check sft|grpo --config RECIPE [key=value ...]`: what a recipe would do, before it costs anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrl.cli.plan import Plan, solve
from llmrl.cli.recipe import heading, read_recipe, wants_help
from llmrl.cli.try_rewards import try_rewards
from llmrl.config.grpo import GRPOConfig
from llmrl.config.sft import SFTConfig
from llmrl.errors import ConfigError

if TYPE_CHECKING:
    from llmrl.data.build import DataReport
    from llmrl.models.shape import ModelShape
    from llmrl.types import Example

_USAGE = """usage: llmrl check sft|grpo --config RECIPE [key=value ...]

Reads the recipe, the data, the tokenizer and the model's configuration (no weights), and shows three rendered rows with what
is learned of them, lengths, batches, the rewards tried on a few rows, and the memory that a run will need.
Exit code 1: something was found that would stop a run."""

SHOWN_ROWS, SHOWN_CHARACTERS = 3, 1200


def run(argv: Sequence[str]) -> int:
    """Prints the report; 0, or 1 when a run would stop over what was found."""
    if wants_help(argv):
        print(_USAGE)
        return 0
    if not argv or argv[0] not in ("sft", "grpo"):
        raise ConfigError(
            "say which kind of recipe it is: `llmrl check sft --config R` or `llmrl check grpo --config R`"
        )
    config = read_recipe("sft", argv[1:]) if argv[0] == "sft" else read_recipe("grpo", argv[1:])
    console = Console(highlight=False)
    problems = check(config, console)
    for problem in problems:
        console.print(Text(f"problem: {problem}", style="bold red"))
    console.print(Text("would stop a run" if problems else "nothing found that would stop a run", style="bold"))
    return 1 if problems else 0


def check(config: SFTConfig | GRPOConfig, console: Console) -> list[str]:
    """Prints every section and returns what would stop a run."""
    from llmrl.data.build import rows_of
    from llmrl.models.load import load_skeleton, stop_token_ids
    from llmrl.models.packing import packing_support
    from llmrl.models.shape import shape_of

    model, tokenizer = load_skeleton(config)
    shape, stop_ids = shape_of(model), stop_token_ids(model, tokenizer)
    packing = packing_support(model.config)
    rows, held_out = rows_of(config)
    heading(console, f"Data: {len(rows)} rows to train on, {len(held_out)} to evaluate on")
    stops = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(stop_ids))))
    if isinstance(config, SFTConfig):
        lengths, problems = _check_examples(config, console, rows, held_out, tokenizer, stop_ids, shape)
    else:
        lengths, problems = _check_prompts(config, console, rows, held_out, tokenizer, shape)
    console.print(Text(f"\nA completion ends with: {stops}"))
    if packing == "one_by_one":
        console.print(Text("note: this model can't be packed; its sequences run one after another", style="yellow"))
    processes = config.num_processes or int(os.environ.get("WORLD_SIZE", "1"))
    plan = solve(config, lengths, processes)
    _print_plan(console, config, plan, len(lengths), processes)
    _print_memory(console, config, plan, shape)
    return problems


def _check_examples(
    config: SFTConfig, console: Console, rows: Any, held_out: Any, tokenizer: Any, stop_ids: Any, shape: ModelShape
) -> tuple[list[int], list[str]]:
    from llmrl.data.build import build_sft_examples

    examples, report = build_sft_examples(rows, tokenizer, config, stop_ids, max_length=shape.positions)
    _print_report(console, report)
    if held_out:
        _, held_out_report = build_sft_examples(held_out, tokenizer, config, stop_ids, max_length=shape.positions)
        _print_report(console, held_out_report, "to evaluate on: ")
    lengths = [len(e) for e in examples]
    _print_lengths(console, {"tokens": lengths, "learned tokens": [int(e.loss_mask.sum()) for e in examples]})
    heading(console, f"{min(SHOWN_ROWS, len(examples))} rows as the model sees them")
    _legend(console)
    for example in examples[:SHOWN_ROWS]:
        console.print(
            Text(f"{example.id}  ({len(example)} tokens, {int(example.loss_mask.sum())} learned)", style="bold")
        )
        console.print(_painted(console, tokenizer, example))
    return lengths, []


def _check_prompts(
    config: GRPOConfig, console: Console, rows: Any, held_out: Any, tokenizer: Any, shape: ModelShape
) -> tuple[list[int], list[str]]:
    from llmrl.data.build import build_prompts

    prompts, report = build_prompts(rows, tokenizer, config)
    _print_report(console, report)
    if held_out:
        _print_report(console, build_prompts(held_out, tokenizer, config)[1], "to evaluate on: ")
    lengths = [len(p.ids) for p in prompts]
    _print_lengths(console, {"prompt tokens": lengths})
    heading(
        console,
        f"{min(SHOWN_ROWS, len(prompts))} prompts as the model sees them; it learns from what it writes after them",
    )
    for prompt in prompts[:SHOWN_ROWS]:
        columns = ", ".join(prompt.columns) or "none"
        console.print(Text(f"{prompt.id}  ({len(prompt.ids)} tokens; columns for rewards: {columns})", style="bold"))
        console.print(Text(_shortened(tokenizer.decode(list(prompt.ids))), style="dim"))
    problems = try_rewards(config, console, prompts, tokenizer)
    limit = shape.positions
    over = sum(n + config.max_completion_length > limit for n in lengths) if limit else 0
    if over:
        problems.append(
            f"{over} prompts leave no room for max_completion_length {config.max_completion_length} in the model's {limit} positions; "
            "lower it, or drop long prompts with max_prompt_length"
        )
    return lengths, problems


def _print_report(console: Console, report: DataReport, what: str = "") -> None:
    share = report.supervised_tokens / max(report.tokens, 1)
    parts = [
        f"{what}{report.examples} kept, {report.dropped} dropped, {report.truncated} truncated; {report.tokens:,} tokens"
    ]
    if report.supervised_tokens:
        parts.append(f"{report.supervised_tokens:,} of them learned ({share:.0%})")
    console.print(Text(", ".join(parts)))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _print_lengths(console: Console, columns: dict[str, list[int]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "min", "median", "p95", "max"):
        table.add_column(name, justify="left" if not name else "right")
    for name, values in columns.items():
        q = np.percentile(values, [0, 50, 95, 100], method="inverted_cdf").astype(int).tolist()
        table.add_row(name, *(f"{v:,}" for v in q))
    console.print(table)


def _legend(console: Console) -> None:
    if console.color_system:
        console.print(Text.assemble("learned tokens are ", ("green", "bold green"), ", the others ", ("dim", "dim")))
    else:
        console.print(Text("learned tokens stand between ⟦ and ⟧"))


def _painted(console: Console, tokenizer: Any, example: Example) -> Text:
    """The row's text, with what is learned in colour, or between brackets where there is no colour."""
    out = Text()
    edges = [0, *(np.flatnonzero(np.diff(example.loss_mask)) + 1).tolist(), len(example)]
    for start, end in pairwise(edges):
        text = _shortened(tokenizer.decode(example.input_ids[start:end].tolist()))
        if not example.loss_mask[start]:
            out.append(text, style="dim")
        else:
            out.append(text if console.color_system else f"⟦{text}⟧", style="bold green")
    return out


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _print_plan(console: Console, config: SFTConfig | GRPOConfig, plan: Plan, rows: int, processes: int) -> None:
    grpo = isinstance(config, GRPOConfig)
    heading(console, f"Batches on {processes} process{'es' if processes > 1 else ''}")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    if isinstance(config, GRPOConfig):
        table.add_row(
            "a step",
            f"{plan.rows_per_step} prompts x {config.num_generations} completions = {plan.sequences_per_step} rollouts",
        )
        table.add_row("", f"{plan.decode_rows} rollouts decoded at once on a process (rollout.max_batch_tokens)")
    else:
        table.add_row("a step", f"{plan.rows_per_step} rows")
    upto = "at most " if grpo else "up to "
    table.add_row("", f"{upto}{plan.tokens_per_step:,} tokens")
    table.add_row(
        "microbatches",
        f"{plan.mean_microbatches:.1f} a step and process on average, {plan.max_microbatches} at most; up to {plan.largest_microbatch:,} "
        f"tokens each ({plan.fill:.0%} of tokens_per_microbatch on average)",
    )
    if plan.largest_microbatch > config.tokens_per_microbatch:
        table.add_row(
            "",
            f"a sequence longer than tokens_per_microbatch {config.tokens_per_microbatch:,} gets a microbatch of its own",
        )
    per_step = plan.updates // plan.steps
    epochs = plan.steps * config.batch_size / rows
    table.add_row("steps", f"{plan.steps:,}, {epochs:.2f} passes over {rows:,} {'prompts' if grpo else 'examples'}")
    table.add_row("updates", f"{plan.updates:,}, {per_step} a step")
    console.print(table)


def _print_memory(console: Console, config: SFTConfig | GRPOConfig, plan: Plan, shape: ModelShape) -> None:
    import torch

    from llmrl.train.memory import estimate_memory

    cuda = torch.cuda.is_available()
    chunk = head_chunk_bytes("cuda" if cuda else "cpu")
    estimate = estimate_memory(
        config,
        shape,
        microbatch_tokens=plan.largest_microbatch,
        head_chunk_bytes=max(chunk, 16 * shape.vocab * 4),
        cache_tokens=plan.cache_tokens,
        decode_rows=plan.decode_rows,
    )
    heading(console, f"Memory of one process on {'CUDA' if cuda else 'the CPU'}, estimated")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    for term in estimate.terms:
        table.add_row(term.name, _size(term.bytes), f"{term.phase}: {term.why}")
    table.add_row("peak", _size(estimate.peak), "without what the framework itself takes", style="bold")
    console.print(table)
    if cuda and estimate.peak > (total := torch.cuda.get_device_properties(0).total_memory):
        console.print(
            Text(
                f"note: more than the device's {_size(total)}; lower tokens_per_microbatch, or use lora", style="yellow"
            )
        )


def head_chunk_bytes(device: str) -> int:
    return 2**25 if device == "cpu" else 2**29


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.1f} MiB"
