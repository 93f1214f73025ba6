"""What `llmrl plan` prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrl.cli.recipe import heading
from llmrl.train.memory import activation_bytes
from llmrl.train.scale import SHARDINGS, USABLE, usable
from llmrl.train.step_time import COLLECTIVE_EFFICIENCY, DECODE_OVERHEAD, matmul_parameters

if TYPE_CHECKING:
    from llmrl.cli.scale import Job, Option


def report(console: Console, args: argparse.Namespace, job: Job, options: Sequence[Option]) -> int:
    """Prints all sections; 0, or 1 when no sharding of the recipe's own training fits."""
    own = [o for o in options if o.job is job]
    fitting = [o for o in own if o.fits]
    best = min(fitting, key=lambda o: o.seconds) if fitting else min(own, key=lambda o: o.memory.peak)
    _intro(console, args, job)
    _shardings(console, job, options, best)
    _memory(console, best)
    _time(console, best)
    if fitting:
        largest = max(best.parts, key=lambda part: part.seconds)
        least = min(o.smallest for o in own if o.smallest is not None)
        console.print(
            Text(
                f"\n{best.sharding.name} fits and is the fastest of what fits; {largest.name} dominates the step. "
                f"The recipe needs at least {_gpus(least)} of this kind.",
                style="bold",
            )
        )
        return 0
    console.print(Text(f"\nDoes not fit {_gpus(job.trainers)} of this kind. What would:", style="bold red"))
    for line in _remedies(job, options):
        console.print(Text(f"  {line}"))
    return 1


def _intro(console: Console, args: argparse.Namespace, job: Job) -> None:
    shape, work, gpu, engine = job.shape, job.work, job.gpu, job.engine
    heading(console, f"{job.config.kind} of {job.config.model_name_or_path} on {args.gpus} x {args.gpu}")
    table = _table()
    trained = "all trained" if shape.trainable == shape.parameters else f"{shape.trainable:,} trained"
    table.add_row(
        "model",
        f"{shape.parameters:,} parameters, {trained}; {2 * shape.parameters / 1e9:.1f} GB in bf16; {matmul_parameters(shape) / 1e9:.2f} billion "
        "multiplied a token",
    )
    table.add_row(
        "GPU",
        f"{gpu.flops / 1e12:.0f} TFLOP/s bf16, {gib(gpu.memory)} at {gpu.bandwidth / 1e12:.2f} TB/s, links {gpu.link / 1e9:.0f} GB/s, "
        f"network {gpu.network / 1e9:.1f} GB/s a GPU, {gpu.node} a machine",
    )
    step = f"{work.tokens:,} tokens in sequences of {work.length:,}"
    if work.rollouts:
        step = f"{work.prompts} prompts of {work.prompt_tokens:,} tokens, {work.rollouts:,} completions of {work.completion_tokens:,} "
        step += f"(at most {work.completion_limit:,}); {work.tokens:,} tokens to learn from"
    table.add_row("a step", f"{step}; {work.updates} update{'s' if work.updates > 1 else ''}")
    if engine is not None:
        where = f"on {engine.gpus} GPUs, {engine.tensor_parallel} a copy of the model"
        if engine.kind == "vllm_server":
            where += f"; {job.trainers} GPUs train" + (", sampling runs ahead" if engine.ahead else "")
        table.add_row("engine", f"{engine.kind} {where}")
    table.add_row(
        "assumed",
        f"{job.assumed.mfu:.0%} of peak FLOP/s (--mfu), {job.assumed.decode_efficiency:.0%} of memory bandwidth in decoding "
        f"(--decode-efficiency) and {1000 * DECODE_OVERHEAD:.0f} ms a decode step, {COLLECTIVE_EFFICIENCY:.0%} of the links' rate; communication "
        f"hides behind computing; {USABLE:.0%} of memory may be filled",
    )
    console.print(table)
    if work.busiest * job.trainers > 1.01:
        console.print(Text(f"note: the rows of an update don't divide evenly: the busiest of {job.trainers} GPUs has "
                           f"{work.busiest * job.trainers:.1f} times the mean, and the others wait", style="yellow"))  # fmt: skip
    if job.config.mixed_precision == "no" and job.config.dtype == "float32":
        console.print(Text("note: this recipe computes in float32, which is slower than the bf16 of these times; mixed_precision: bf16", style="yellow"))  # fmt: skip


def _shardings(console: Console, job: Job, options: Sequence[Option], best: Option) -> None:
    heading(console, "Which sharding fits")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "a GPU", "", "from GPUs", "a step", ""):
        table.add_column(column, justify="right" if column in ("a GPU", "from GPUs", "a step") else "left")
    for o in options:
        name = o.sharding.name if o.job is job else f"lora r={o.job.config.lora.r}, {o.sharding.name}"
        table.add_row(
            name,
            gib(o.memory.peak),
            "fits" if o.fits else "too much",
            "never" if o.smallest is None else f"{o.smallest:,}",
            _seconds(o.seconds) if o.fits else "",
            o.sharding.what,
            style="bold" if o is best else None if o.fits else "dim",
        )
    console.print(table)


def _memory(console: Console, best: Option) -> None:
    heading(console, f"Memory of one GPU that trains, {best.sharding.name}")
    table = _table()
    table.columns[1].justify = "right"
    for term in best.memory.terms:
        table.add_row(term.name, gib(term.bytes), f"{term.phase}: {term.why}")
    table.add_row("peak", gib(best.memory.peak), f"of {gib(usable(best.job.gpu))} that may be filled", style="bold")
    other = best.job.config.model_copy(update={"gradient_checkpointing": not best.job.config.gradient_checkpointing})
    size = activation_bytes(other, best.job.shape, best.job.load.microbatch_tokens)
    with_it = "with" if other.gradient_checkpointing else "without"
    table.add_row("", gib(size), f"would be the activations {with_it} gradient_checkpointing", style="dim")
    console.print(table)


def _time(console: Console, best: Option) -> None:
    heading(console, "Time of a step")
    table = _table()
    table.columns[1].justify = table.columns[2].justify = "right"
    whole = sum(part.seconds for part in best.parts)
    for part in best.parts:
        table.add_row(part.name, _seconds(part.seconds), f"{part.seconds / whole:.0%}", part.bound)
    ahead = best.job.engine is not None and best.job.engine.ahead
    table.add_row(
        "a step", _seconds(best.seconds), "", "the longer of generation and the rest" if ahead else "", style="bold"
    )
    console.print(table)
    work, gpus = best.job.work, best.job.trainers
    rates = f"{work.tokens / best.seconds:,.0f} tokens/s learnt from"
    if best.job.engine is not None:
        if best.job.engine.kind == "vllm_server":
            gpus += best.job.engine.gpus
        sampled = work.rollouts * work.completion_tokens
        generation = next(part.seconds for part in best.parts if part.name == "generation")
        rates += f", {sampled / generation:,.0f} tokens/s sampled while sampling"
    console.print(
        Text(f"{rates}; {work.tokens / best.seconds / gpus:,.0f} a GPU; {3600 / best.seconds:,.1f} steps an hour")
    )


def _remedies(job: Job, options: Sequence[Option]) -> Iterator[str]:
    """Changes that would make it fit, the mildest first; each is tried before it is named."""
    counts = {o.sharding.name: o.smallest for o in options if o.job is job and o.smallest is not None}
    if counts:
        least = min(counts, key=lambda key: counts[key])
        server = job.engine is not None and job.engine.kind == "vllm_server"
        of_these = f" and --engine-gpus {job.engine.tensor_parallel}" if server and job.engine is not None else ""
        yield f"{_gpus(counts[least])} of this kind with {least}{of_these}"
    yield from _changes(job)
    for o in options:
        if o.job is not job and o.fits:
            yield f"lora.r={o.job.config.lora.r} with {o.sharding.name}: {gib(o.memory.peak)} a GPU"
            break
    if job.engine is not None and job.engine.kind == "local":
        yield "rollout.engine vllm_colocate or vllm_server, which can spread one copy of the model over GPUs (tensor_parallel_size)"
    yield "larger GPUs, or a smaller model"


def _changes(job: Job) -> Iterator[str]:
    """The first of these that is enough, added up: a smaller cache, gradient checkpointing, smaller microbatches."""
    said = []
    for key, change in (("rollout.max_batch_tokens", _less_cache), ("gradient_checkpointing", _checkpointed)):
        if (changed := change(job)) is None:
            continue
        job, value = changed
        said.append(f"{key}={value}")
        if found := _fitting(job):
            yield f"{' '.join(said)} with {found}"
            return
    tokens, largest = job.config.tokens_per_microbatch, job.load.microbatch_tokens
    while tokens > 256 and job.load.microbatch_tokens <= largest:
        tokens, largest = tokens // 2, job.load.microbatch_tokens
        job = job.with_microbatches(tokens)
        if found := _fitting(job):
            yield " ".join([*said, f"tokens_per_microbatch={tokens}", "with", found])
            return


def _less_cache(job: Job) -> tuple[Job, int] | None:
    """With fewer rows at once in the local engine, halved until it fits; None where there is but one."""
    load, changed = job.load, None
    while load.decode_rows > 1:
        slot, rows = load.cache_tokens // load.decode_rows, load.decode_rows // 2
        load = replace(load, cache_tokens=slot * rows, decode_rows=rows)
        changed = replace(job, load=load), load.cache_tokens
        if _fitting(changed[0]):
            break
    return changed


def _checkpointed(job: Job) -> tuple[Job, str] | None:
    if job.config.gradient_checkpointing:
        return None
    return replace(job, config=job.config.model_copy(update={"gradient_checkpointing": True})), "true"


def _fitting(job: Job) -> str | None:
    return next((s.name for s in SHARDINGS if job.memory(s, job.trainers).peak <= usable(job.gpu)), None)


def _table() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(4):
        table.add_column()
    return table


def _gpus(n: int) -> str:
    return f"{n:,} GPU{'s' if n > 1 else ''}"


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def gib(n: float) -> str:
    return f"{n / 2**30:.1f} GiB"
