"""`llmrl plan RECIPE --gpus 64 --gpu h100-80g`: what a recipe needs on a cluster, and how long a step takes there, on paper."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmrl.cli.plan import samples, solve
from llmrl.cli.recipe import recipe_kinds
from llmrl.config.dpo import DPOConfig
from llmrl.config.grpo import GRPOConfig
from llmrl.config.model import LoraSettings, ModelFields
from llmrl.config.ppo import PPOConfig
from llmrl.config.reward_model import RewardConfig
from llmrl.errors import ConfigError

if TYPE_CHECKING:
    from llmrl.models.shape import ModelShape
    from llmrl.train.gpus import Gpu
    from llmrl.train.memory import MemoryEstimate
    from llmrl.train.scale import Load, Sharding
    from llmrl.train.step_time import Assumed, Engine, Part, Work

KINDS = ("grpo", "ppo", "dpo", "sft", "reward")
PROMPT_TOKENS, ROW_TOKENS = 512, 2048
SERVER_MEMORY = 0.9  # vLLM's own default of gpu_memory_utilization
_REWARD = "a reward's model (for a plan a short name does: rewards.0.model=qwen2.5-1.5b)"
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Job:
    """A recipe's model on given GPUs: what of memory and what of a step does not depend on how it is sharded.

    lengths: tokens of prompt, mean completion and longest completion.
    """

    config: Any
    shape: ModelShape
    critic: ModelShape | None
    lengths: tuple[int, int, int]
    load: Load
    work: Work
    engine: Engine | None
    gpu: Gpu
    trainers: int
    assumed: Assumed

    def memory(self, sharding: Sharding, trainers: int) -> MemoryEstimate:
        """Of one of `trainers` GPUs."""
        from llmrl.train.scale import sharded_memory

        return sharded_memory(
            self.config, self.shape, self.load, sharding, trainers, node=self.gpu.node, critic=self.critic
        )

    def with_microbatches(self, tokens: int) -> Job:
        """The same with another tokens_per_microbatch; its batch is cut anew."""
        config = self.config.model_copy(update={"tokens_per_microbatch": tokens})
        largest = _solve(config, self.lengths[0], self.lengths[2], self.trainers).largest_microbatch
        return replace(self, config=config, load=replace(self.load, microbatch_tokens=largest))

    def parts(self, sharding: Sharding) -> list[Part]:
        from llmrl.train.step_time import step_time

        return step_time(self.shape, self.work, sharding, self.gpu, self.trainers, self.assumed, self.engine)


@dataclass(frozen=True)
class Option:
    """A job under one sharding; `smallest` is the least number of GPUs, engines included, at which it fits."""

    job: Job
    sharding: Sharding
    memory: MemoryEstimate
    fits: bool
    smallest: int | None
    parts: list[Part]
    seconds: float


def run(argv: Sequence[str]) -> int:
    """Prints the plan; 0, or 1 when nothing of the recipe's own training fits."""
    args, rest = _parser().parse_known_args(list(argv))
    for name in ("mfu", "decode_efficiency"):
        if not 0 < getattr(args, name) <= 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: a share of the peak, above 0, at most 1"
            )
    for name in ("gpus", "prompt_tokens", "completion_tokens", "engine_gpus"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {number}: at least 1")
    from llmrl.cli.scale_report import report
    from llmrl.train.gpus import find_gpu

    gpu = find_gpu(args.gpu)
    taken = recipe_kinds([args.kind] if args.kind else KINDS, args.recipe, rest, "llmrl plan")
    if len(taken) > 1:
        names = " or ".join(f"--kind {config.kind}" for config in taken)
        raise ConfigError(f"{args.recipe} would do for several trainers; say which one is meant: {names}")
    config: Any = taken[0]
    if args.model:
        config = config.model_copy(update={"model_name_or_path": args.model})
    own = make_job(config, gpu, args)
    jobs = [own]
    if config.lora is None:
        jobs.append(make_job(config.model_copy(update={"lora": LoraSettings()}), gpu, args))
    options = [option for job in jobs for option in _options(job)]
    return report(Console(highlight=False), args, own, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmrl plan",
        usage="llmrl plan RECIPE --gpus N --gpu NAME [--model NAME] [key=value ...]",
        description="Memory by term, time of a step by part, and which sharding fits, from stated formulas (docs/scale.md). "
        "Nothing is downloaded for models known by name.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a recipe's file, or the name of a shipped one")
    parser.add_argument("--gpus", type=int, required=True, help="all GPUs, those of generation servers included")
    parser.add_argument("--gpu", required=True, help="h100-80g, a100-80g, ...; a wrong name lists them")
    parser.add_argument("--model", help="instead of the recipe's: llama-70b, qwen3-8b, ..., a directory or a hub id")
    parser.add_argument("--kind", choices=KINDS, help="where a recipe would do for several trainers")
    parser.add_argument("--prompt-tokens", type=int, help=f"mean; default: max_prompt_length, else {PROMPT_TOKENS}")
    parser.add_argument("--completion-tokens", type=int, help="mean; default: as long as the recipe allows")
    parser.add_argument("--engine-gpus", type=int, help="of vllm_server; default: half of --gpus")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of peak FLOP/s in training, recomputation counted"
    )
    parser.add_argument("--decode-efficiency", type=float, default=0.6, help="share of memory bandwidth in decoding")
    return parser


def make_job(config: Any, gpu: Gpu, args: argparse.Namespace) -> Job:
    """Shapes, lengths, the batch as `llmrl check` cuts it, and the engine. Raises ConfigError where the engine can't be placed."""
    from llmrl.models.known import named_shape
    from llmrl.train.scale import Load
    from llmrl.train.step_time import Assumed

    shape = named_shape(config, "SEQ_CLS" if isinstance(config, RewardConfig) else "CAUSAL_LM")
    critic = None
    if isinstance(config, PPOConfig) and config.critic == "separate":
        name = config.critic_model_name_or_path or config.model_name_or_path
        fields = config.model_copy(update={"model_name_or_path": name})
        critic = named_shape(fields, "SEQ_CLS", "critic_model_name_or_path")
    judges = [
        named_shape(ModelFields(model_name_or_path=m), "SEQ_CLS", _REWARD).parameters for m in _reward_models(config)
    ]
    prompt, completion, limit = _lengths(config, args)
    trainers, engine = _place(config, shape, gpu, args, prompt + limit)
    longest = _solve(config, prompt, limit, trainers)
    if engine is not None and engine.kind == "local":
        engine = replace(engine, rows=longest.decode_rows)
    colocated = engine is not None and engine.kind == "vllm_colocate"
    load = Load(
        microbatch_tokens=longest.largest_microbatch,
        cache_tokens=longest.cache_tokens,
        decode_rows=longest.decode_rows,
        reward_model_bytes=2 * sum(judges),
        engine_bytes=int(config.rollout.gpu_memory_utilization * gpu.memory) if colocated else 0,
        engine_phase="sampling" if not colocated or config.rollout.sleep_level else "always",
    )
    lengths = (prompt, completion, limit)
    work = _work(config, shape, critic, sum(judges), lengths, trainers)
    assumed = Assumed(args.mfu, args.decode_efficiency)
    return Job(config, shape, critic, lengths, load, work, engine, gpu, trainers, assumed)


def _reward_models(config: Any) -> list[str]:
    return [name for spec in config.rewards for name in spec.model] if samples(config) else []


def _lengths(config: Any, args: argparse.Namespace) -> tuple[int, int, int]:
    """(prompt, completion, longest completion) in tokens; of a row of SFT or a side of a pair where nothing is sampled."""
    if samples(config):
        prompt = args.prompt_tokens or config.max_prompt_length or PROMPT_TOKENS
        limit = config.max_completion_length
        completion = args.completion_tokens or limit
        if completion > limit:
            raise ConfigError(f"--completion-tokens {completion}: the recipe's max_completion_length is {limit}")
        return prompt, completion, limit
    whole = config.max_length or ROW_TOKENS
    prompt = args.prompt_tokens or min(PROMPT_TOKENS, whole // 2)
    completion = args.completion_tokens or max(1, whole - prompt)
    return prompt, completion, completion


def _solve(config: Any, prompt: int, completion: int, trainers: int) -> Any:
    """One step's batch of equal rows, cut as the trainer cuts it."""
    update: dict[str, object] = {"max_steps": 1}
    length = prompt
    if samples(config):
        update["max_completion_length"] = completion
    else:
        pairs = isinstance(config, DPOConfig) or (
            isinstance(config, RewardConfig) and config.loss_type == "bradley_terry"
        )
        length = (prompt + completion) * (2 if pairs else 1)
    return solve(config.model_copy(update=update), [length] * config.batch_size, trainers)


def _work(
    config: Any,
    shape: ModelShape,
    critic: ModelShape | None,
    reward_parameters: int,
    lengths: tuple[int, int, int],
    trainers: int,
) -> Work:
    from llmrl.train.step_time import Work

    prompt, completion, limit = lengths
    plan = _solve(config, prompt, completion, trainers)
    scored, referenced = _forwards(config)
    share = config.updates_per_step * math.ceil(config.batch_size / config.updates_per_step / trainers)
    sampled = samples(config)
    work = Work(
        tokens=plan.tokens_per_step,
        length=prompt + completion,
        busiest=min(1.0, share / config.batch_size),
        microbatches=plan.max_microbatches,
        updates=plan.updates,
        passes=config.num_iterations if isinstance(config, GRPOConfig | PPOConfig) else 1,
        scored=scored,
        referenced=referenced,
        critic=critic,
        checkpointing=config.gradient_checkpointing,
        width=_BYTES[config.dtype],
        compute_bytes=2 if config.mixed_precision != "no" else _BYTES[config.dtype],
    )
    if not sampled:
        return work
    return replace(
        work,
        reward_parameters=reward_parameters,
        rollouts=config.batch_size * config.num_generations,
        prompts=config.batch_size,
        prompt_tokens=prompt,
        completion_tokens=completion,
        completion_limit=limit,
    )


def _forwards(config: Any) -> tuple[int, int]:
    """Forward passes over a step's tokens without a backward: (by the policy, by the reference)."""
    if isinstance(config, GRPOConfig):
        several = config.updates_per_step * config.num_iterations > 1
        old = several or config.top_entropy_quantile < 1 or (config.beta > 0 and config.kl_place == "reward")
        return int(old), int(config.beta > 0)
    if isinstance(config, PPOConfig):
        return 1 + (config.kl_to == "old"), int(config.needs_reference)
    if isinstance(config, DPOConfig) and not config.reference_free:
        live = bool(config.rewards) or config.sync_ref_model or config.reference_logprobs == "on_the_fly"
        return 0, int(live)
    return 0, 0


def _place(
    config: Any, shape: ModelShape, gpu: Gpu, args: argparse.Namespace, longest: int
) -> tuple[int, Engine | None]:
    """(GPUs that train, the engine). Raises ConfigError where the engine's weights and one sequence don't fit."""
    from llmrl.train.step_time import Engine

    if args.engine_gpus and not (samples(config) and config.rollout.engine == "vllm_server"):
        raise ConfigError(
            "--engine-gpus is for recipes with rollout.engine vllm_server; this one samples on the GPUs that train"
        )
    if not samples(config):
        return args.gpus, None
    rollout = config.rollout
    if rollout.engine == "local":
        return args.gpus, Engine("local", args.gpus, 1, 0)
    if rollout.engine == "vllm_colocate":
        budget = rollout.gpu_memory_utilization * gpu.memory
        ways, cache = _copies(shape, budget, longest, args.gpus, gpu, rollout.tensor_parallel_size)
        return args.gpus, Engine("vllm_colocate", args.gpus, ways, cache)
    given = args.engine_gpus or args.gpus // 2
    if not 0 < given < args.gpus:
        raise ConfigError(
            f"--gpus {args.gpus}: vllm_server needs GPUs that train and GPUs that sample; {given} would sample"
        )
    ways, cache = _copies(shape, SERVER_MEMORY * gpu.memory, longest, given, gpu, 1, half=True)
    engines = given // ways * ways
    ahead = rollout.max_staleness > 0
    return args.gpus - engines, Engine("vllm_server", engines, ways, cache, ahead, rollout.transfer)


def _copies(
    shape: ModelShape, budget: float, longest: int, gpus: int, gpu: Gpu, least: int, *, half: bool = False
) -> tuple[int, int]:
    """(tensor parallel degree, bytes of cache of a copy): the least degree, from `least`, at which the cache holds a sequence, and
    with `half` is as large as the weights."""
    from llmrl.train.step_time import cache_bytes_per_token

    weights, one = 2 * shape.parameters, longest * cache_bytes_per_token(shape)
    best: tuple[int, int] | None = None
    for ways in (1, 2, 4, 8):
        if ways < least or ways > min(gpus, gpu.node) or gpus % ways or shape.heads % ways:
            continue
        cache = int(budget * ways) - weights
        if cache >= (max(one, weights) if half else one):
            return ways, cache
        if cache >= one:
            best = best or (ways, cache)
    if best is None:
        raise ConfigError(
            f"no engine fits: {weights / 2**30:.0f} GiB of weights in 16 bits and the cache of one sequence of {longest:,} tokens need "
            f"more than {budget / 2**30:.0f} GiB on each of {min(gpus, gpu.node)} GPUs (tensor parallelism goes to {gpu.node}, and must divide "
            f"{shape.heads} heads). Give vLLM more (rollout.gpu_memory_utilization, --engine-gpus), or take larger GPUs"
        )
    return best


def _options(job: Job) -> Iterator[Option]:
    """The job under every sharding that makes sense on its GPUs."""
    from llmrl.train.scale import SHARDINGS, smallest, usable
    from llmrl.train.step_time import total

    copy = job.engine.tensor_parallel if job.engine is not None else 1
    elsewhere = copy if job.engine is not None and job.engine.kind == "vllm_server" else 0
    for sharding in SHARDINGS:
        if sharding.name == "fsdp2-hybrid" and (job.trainers <= job.gpu.node or job.trainers % job.gpu.node):
            continue
        memory = job.memory(sharding, job.trainers)
        least = smallest(job.gpu, lambda gpus, sharding=sharding: job.memory(sharding, gpus).peak)
        parts = job.parts(sharding)
        yield Option(
            job,
            sharding,
            memory,
            memory.peak <= usable(job.gpu),
            None if least is None else max(copy, least + elsewhere),
            parts,
            total(parts, job.engine),
        )
