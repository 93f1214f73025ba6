"""`llmrl check KIND --config RECIPE [key=value ...]`: what a recipe would do, before it costs anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrl.cli.plan import Plan, SamplingConfig, samples, solve
from llmrl.cli.recipe import heading, read_recipe, wants_help
from llmrl.config.dpo import DPOConfig
from llmrl.config.grpo import GRPOConfig
from llmrl.config.model import ModelFields
from llmrl.config.ppo import PPOConfig
from llmrl.config.reward_model import RewardConfig
from llmrl.errors import ConfigError

if TYPE_CHECKING:
    from llmrl.data.build import DatasetConfig
    from llmrl.models.shape import ModelShape
    from llmrl.train.memory import MemoryEstimate

KINDS = ("sft", "reward", "dpo", "ppo", "grpo")
_USAGE = f"""usage: llmrl check {"|".join(KINDS)} --config RECIPE [key=value ...]

Reads the recipe, the data, the tokenizer and the model's configuration (no weights but those of reward models), and shows three
rows or pairs with what is learned of them, lengths, batches, the rewards tried on a few rows, and the memory that a run will need.
Exit code 1: something was found that would stop a run."""


def run(argv: Sequence[str]) -> int:
    """Prints the report; 0, or 1 when a run would stop over what was found."""
    if wants_help(argv):
        print(_USAGE)
        return 0
    if not argv or argv[0] not in KINDS:
        raise ConfigError(
            f"say which kind of recipe it is, {', '.join(KINDS)}: `llmrl check sft --config R`, `llmrl check dpo --config R`, ..."
        )
    config = read_recipe(argv[0], argv[1:])
    console = Console(highlight=False)
    problems = check(config, console)
    for problem in problems:
        console.print(Text(f"problem: {problem}", style="bold red"))
    console.print(Text("would stop a run" if problems else "nothing found that would stop a run", style="bold"))
    return 1 if problems else 0


def check(config: Any, console: Console) -> list[str]:
    """Prints every section and returns what would stop a run."""
    from llmrl.cli.check_rows import check_rows
    from llmrl.data.build import rows_of
    from llmrl.models.load import load_skeleton, stop_token_ids
    from llmrl.models.packing import packing_support
    from llmrl.models.scorer import load_scorer_skeleton
    from llmrl.models.shape import shape_of

    scored = isinstance(config, RewardConfig)
    model, tokenizer = load_scorer_skeleton(config) if scored else load_skeleton(config)
    shape, stop_ids = shape_of(model), stop_token_ids(model, tokenizer)
    rows, held_out = rows_of(config)
    heading(console, f"Data: {len(rows)} rows to train on, {len(held_out)} to evaluate on")
    lengths, problems = check_rows(config, console, rows, held_out, tokenizer, stop_ids, shape)
    if not scored:
        stops = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(stop_ids))))
        console.print(Text(f"\nA completion ends with: {stops}"))
    packing = packing_support(model.config, type(model))
    if packing == "one_by_one":
        console.print(Text("note: this model can't be packed; its sequences run one after another", style="yellow"))
    processes = config.num_processes or int(os.environ.get("WORLD_SIZE", "1"))
    plan = solve(config, lengths, processes, packed=packing == "packed")
    _print_plan(console, config, plan, len(lengths), processes)
    _print_memory(console, config, plan, shape, processes)
    return problems


def _print_plan(console: Console, config: DatasetConfig, plan: Plan, rows: int, processes: int) -> None:
    from llmrl.cli.check_rows import noun

    what, sampled = noun(config), samples(config)
    heading(console, f"Batches on {processes} process{'es' if processes > 1 else ''}")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    step = f"{plan.rows_per_step} {what}"
    if samples(config):
        plural = "s" if config.num_generations > 1 else ""
        step += f" x {config.num_generations} completion{plural} = {plan.sequences_per_step} rollouts"
        if isinstance(config, DPOConfig):
            step += f", of which the best and the worst make {plan.rows_per_step} pairs"
    table.add_row("a step", step)
    if samples(config):
        table.add_row("", _who_samples(config, plan))
    table.add_row("", f"{'at most' if sampled else 'up to'} {plan.tokens_per_step:,} tokens to learn from")
    table.add_row(
        "microbatches",
        f"{plan.mean_microbatches:.1f} a step and process on average, {plan.max_microbatches} at most; up to {plan.largest_microbatch:,} "
        f"tokens each ({plan.fill:.0%} of tokens_per_microbatch on average)",
    )
    if plan.largest_microbatch > config.tokens_per_microbatch:
        unit = "pair" if what == "pairs" or isinstance(config, DPOConfig) else "sequence"
        table.add_row(
            "",
            f"a {unit} longer than tokens_per_microbatch {config.tokens_per_microbatch:,} gets a microbatch of its own",
        )
    epochs = plan.steps * config.batch_size / rows
    table.add_row("steps", f"{plan.steps:,}, {epochs:.2f} passes over {rows:,} {what}")
    per_step = f"{plan.updates // plan.steps} a step"
    if isinstance(config, GRPOConfig | PPOConfig):
        per_step += f" (updates_per_step {config.updates_per_step} x num_iterations {config.num_iterations})"
    table.add_row("updates", f"{plan.updates:,}, {per_step}")
    if isinstance(config, DPOConfig) and what == "pairs" and not config.reference_free:
        live = config.sync_ref_model or config.reference_logprobs == "on_the_fly"
        how = "a second forward of every microbatch" if live else "one pass before the first step, then from disk"
        table.add_row("reference", f"log-probs by {how} (reference_logprobs)")
    console.print(table)


def _who_samples(config: SamplingConfig, plan: Plan) -> str:
    rollout = config.rollout
    if rollout.engine == "local":
        return f"{plan.decode_rows} rollouts decoded at once on a process (rollout.max_batch_tokens)"
    if rollout.engine == "vllm_server":
        ahead = f", up to {rollout.max_staleness} steps ahead" if rollout.max_staleness else ""
        return f"sampled by {', '.join(rollout.urls)}{ahead} (`llmrl doctor` asks them)"
    return f"sampled by vLLM in this process, with {rollout.gpu_memory_utilization:.0%} of the device's memory"


def memory_of(
    config: DatasetConfig, plan: Plan, shape: ModelShape, strategy: str = "ddp", processes: int = 1
) -> MemoryEstimate:
    """The estimate for one of the processes of a run by this plan, on the device of this machine; `strategy` as in train/launch.py."""
    import torch

    from llmrl.train.memory import estimate_memory
    from llmrl.train.scale import SHARDINGS, spread

    cuda = torch.cuda.is_available()
    critic = _critic_shape(config) if isinstance(config, PPOConfig) and config.critic == "separate" else None
    whole = estimate_memory(
        config,
        shape,
        microbatch_tokens=plan.largest_microbatch,
        head_chunk_bytes=max(head_chunk_bytes("cuda" if cuda else "cpu"), 16 * shape.vocab * 4),
        cache_tokens=plan.cache_tokens,
        decode_rows=plan.decode_rows,
        critic=critic,
        reward_model_bytes=_reward_model_bytes(config) if samples(config) else 0,
        cuda=cuda,
    )
    sharding = next(s for s in SHARDINGS if s.name == strategy)
    return spread(whole, config, shape, sharding, processes, critic=critic)


def _print_memory(console: Console, config: DatasetConfig, plan: Plan, shape: ModelShape, processes: int) -> None:
    import torch

    from llmrl.train.launch import check_sharded, read_launch

    cuda = torch.cuda.is_available()
    strategy = read_launch(os.environ, config.mixed_precision).strategy
    if strategy != "ddp":
        check_sharded(config, strategy)
    estimate = memory_of(config, plan, shape, strategy, processes)
    where = f"{'CUDA' if cuda else 'the CPU'}{'' if strategy == 'ddp' else f' under {strategy}'}"
    heading(console, f"Memory of one process on {where}, estimated")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    for term in estimate.terms:
        table.add_row(term.name, _size(term.bytes), f"{term.phase}: {term.why}")
    table.add_row("peak", _size(estimate.peak), "without what the framework itself takes", style="bold")
    if estimate.host:
        table.add_row("host memory", _size(estimate.host), "beside it, of each process", style="bold")
    console.print(table)
    if cuda and estimate.peak > (total := torch.cuda.get_device_properties(0).total_memory):
        console.print(
            Text(
                f"note: more than the device's {_size(total)}; lower tokens_per_microbatch, or use lora", style="yellow"
            )
        )


def _critic_shape(config: PPOConfig) -> ModelShape:
    from llmrl.models.scorer import load_critic_skeleton
    from llmrl.models.shape import shape_of

    return shape_of(load_critic_skeleton(config))


def _reward_model_bytes(config: SamplingConfig) -> int:
    """They score in the type that they were saved in, bfloat16 or float32."""
    import torch

    from llmrl.models.source import Source

    total = 0
    for name in (name for spec in config.rewards for name in spec.model):
        source = Source(ModelFields(model_name_or_path=name), "SEQ_CLS")
        width = 2 if source.config.dtype == torch.bfloat16 else 4
        with torch.device("meta"):
            total += width * sum(p.numel() for p in source.skeleton().parameters())
    return total


def head_chunk_bytes(device: str) -> int:
    return 2**25 if device == "cpu" else 2**29


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**28 else f"{n / 2**20:.1f} MiB"
