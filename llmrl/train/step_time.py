"""How long one step takes, part by part, from operations, bytes and the rates of a GPU. docs/scale.md has the formulas and their sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmrl.models.shape import ModelShape
from llmrl.train.gpus import Gpu
from llmrl.train.scale import Sharding

COLLECTIVE_EFFICIENCY = 0.7  # of the links' rate that NCCL reaches with large messages
DECODE_OVERHEAD = 2e-3  # seconds a decode step beside reading and computing: scheduling, sampling, launches
ALL_REDUCE_LATENCY = 10e-6  # seconds of one all-reduce of a few rows within a machine
DISK = 2e9  # bytes/s of weights through files


@dataclass(frozen=True)
class Assumed:
    """mfu: share of the peak that executed matmuls of training and prefill reach, recomputation counted. decode_efficiency: share
    of memory bandwidth that decoding reaches."""

    mfu: float = 0.4
    decode_efficiency: float = 0.6


@dataclass(frozen=True)
class Work:
    """What a step does, over all processes.

    tokens are those of one pass over the step's batch, `length` tokens a sequence; `busiest` is the largest share of them that one
    process gets (1 / processes where work is even). `scored` are forward passes by the policy before the first update, `referenced`
    by the reference, `critic` the separate critic's shape or None.
    """

    tokens: int
    length: float
    busiest: float
    microbatches: int
    updates: int
    passes: int = 1
    scored: int = 0
    referenced: int = 0
    critic: ModelShape | None = None
    reward_parameters: int = 0
    rollouts: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    completion_limit: int = 0
    checkpointing: bool = False
    width: int = 4
    compute_bytes: int = 2


@dataclass(frozen=True)
class Engine:
    """Who samples: `gpus` in copies of the model of `tensor_parallel` GPUs each, `cache_bytes` of key-value cache a copy.

    kind: "local", "vllm_colocate" or "vllm_server". ahead: the next step is sampled while this one trains. transfer: "disk" or "nccl".
    """

    kind: str
    gpus: int
    tensor_parallel: int
    cache_bytes: int
    ahead: bool = False
    transfer: str = "disk"
    rows: int | None = None  # the most that are decoded at once; None: as many as the cache holds


@dataclass(frozen=True)
class Part:
    """Seconds of one part of a step, and what bounds it."""

    name: str
    seconds: float
    bound: str


def matmul_parameters(shape: ModelShape) -> int:
    """Parameters that a token is multiplied with: layers and head, not the lookup of the embedding."""
    return shape.layers * shape.layer_parameters + shape.head


def forward_flops(shape: ModelShape, tokens: float, length: float) -> tuple[float, float]:
    """(matmul, attention) operations of a forward over `tokens` in sequences of `length`.

    2 N a token; Q K and A V are 2 x 2 x width for each of the length / 2 tokens that a causal token sees on average.
    """
    return 2 * matmul_parameters(shape) * tokens, 2 * shape.layers * shape.query_width * length * tokens


def update_flops(shape: ModelShape, tokens: float, length: float, checkpointing: bool) -> float:
    """Forward, gradients of activations, gradients of what is trained, and the second forward of checkpointing: 6 N or 8 N a token
    in full training, 4 N or 6 N with adapters, each plus attention's share."""
    matmul, attention = forward_flops(shape, tokens, length)
    trained = shape.trainable / shape.parameters
    return matmul * (2 + trained + checkpointing) + attention * (3 + checkpointing)


def collective_seconds(size: float, gpus: int, gpu: Gpu) -> float:
    """An all-gather or a reduce-scatter of `size` bytes in total over `gpus`; an all-reduce is both.

    Between machines every GPU's network card carries a share, so that a machine takes node x network.
    """
    rate = gpu.link if gpus <= gpu.node else min(gpu.link, gpu.node * gpu.network)
    return size * (gpus - 1) / gpus / (rate * COLLECTIVE_EFFICIENCY)


def step_time(
    shape: ModelShape,
    work: Work,
    sharding: Sharding,
    gpu: Gpu,
    gpus: int,
    assumed: Assumed,
    engine: Engine | None = None,
) -> list[Part]:
    """The parts of a step: generation, log-probs, update, sync. Communication hides behind computing of the same part as far as it can."""
    parts = []
    if engine is not None:
        parts.append(generation(shape, work, engine, gpu, assumed))
    if passes := _scoring(shape, work):
        flops = sum(sum(forward_flops(of, work.tokens, work.length)) * times for of, times in passes)
        size = sum(of.parameters * times for of, times in passes) * work.compute_bytes * work.microbatches
        gather = collective_seconds(size, sharding.ways("weights", gpus, gpu.node), gpu) if sharding.gathers else 0.0
        rewards = 2 * work.reward_parameters * work.rollouts * (work.prompt_tokens + work.completion_tokens)
        parts.append(_hidden("log-probs", (flops + rewards) * work.busiest / (gpu.flops * assumed.mfu), gather))
    models = [shape] + [work.critic] * (work.critic is not None)
    flops = sum(update_flops(m, work.tokens, work.length, work.checkpointing) for m in models if m is not None)
    seconds = work.passes * flops * work.busiest / (gpu.flops * assumed.mfu)
    talk = sum(_update_traffic(m, work, sharding, gpu, gpus) for m in models if m is not None)
    parts.append(_hidden("update", seconds, talk))
    if engine is not None:
        parts.append(sync(shape, engine, sharding, gpu, gpus))
    return parts


def total(parts: Sequence[Part], engine: Engine | None = None) -> float:
    """Seconds of a step: the sum, or the longer of sampling and the rest where the next step is sampled meanwhile."""
    everything = sum(part.seconds for part in parts)
    if engine is None or not engine.ahead:
        return everything
    sampling = sum(part.seconds for part in parts if part.name == "generation")
    return max(sampling, everything - sampling)


def _scoring(shape: ModelShape, work: Work) -> list[tuple[ModelShape, int]]:
    found = [(shape, work.scored + work.referenced)]
    if work.critic is not None:
        found.append((work.critic, 1))
    return [(of, times) for of, times in found if times]


def _update_traffic(shape: ModelShape, work: Work, sharding: Sharding, gpu: Gpu, gpus: int) -> float:
    """Seconds that links are busy with weights and gradients in all passes of a step."""
    gradients = shape.trainable * work.width
    weights = shape.parameters * work.compute_bytes
    ways = sharding.ways("weights", gpus, gpu.node)
    microbatches = work.passes * work.microbatches
    if sharding.name == "ddp":
        return work.updates * 2 * collective_seconds(gradients, gpus, gpu)
    if sharding.name == "zero2":
        changed = shape.trainable * work.compute_bytes
        return microbatches * collective_seconds(gradients, gpus, gpu) + work.updates * collective_seconds(
            changed, gpus, gpu
        )
    inside = microbatches * collective_seconds(2 * weights + gradients, ways, gpu)
    machines = gpus // ways
    between = 2 * gradients / ways * (machines - 1) / machines / (gpu.network * COLLECTIVE_EFFICIENCY)
    return inside + microbatches * between


def _hidden(name: str, compute: float, talk: float) -> Part:
    if talk > compute:
        return Part(name, talk, "communication")
    return Part(name, compute, "matmuls")


def cache_bytes_per_token(shape: ModelShape) -> int:
    """Of keys and values in 16 bits."""
    return 2 * shape.layers * shape.kv_width * 2


def decode_step(
    shape: ModelShape, rows: float, context: float, tensor_parallel: int, gpu: Gpu, assumed: Assumed
) -> tuple[float, str]:
    """(seconds, bound) of one token for `rows` sequences of `context` tokens: the slower of reading weights and cache and of
    computing, plus the all-reduces of tensor parallelism and a constant."""
    read = 2 * matmul_parameters(shape) + rows * context * cache_bytes_per_token(shape)
    memory = read / tensor_parallel / (gpu.bandwidth * assumed.decode_efficiency)
    flops = rows * (2 * matmul_parameters(shape) + 4 * shape.layers * shape.query_width * context)
    compute = flops / tensor_parallel / (gpu.flops * assumed.mfu)
    talk = 0.0
    if tensor_parallel > 1:  # two all-reduces a layer, of a row's hidden state in 16 bits
        talk = (
            2
            * shape.layers
            * (ALL_REDUCE_LATENCY + 2 * collective_seconds(rows * shape.hidden * 2, tensor_parallel, gpu))
        )
    bound = "memory bandwidth" if memory >= compute else "matmuls"
    return max(memory, compute) + talk + DECODE_OVERHEAD, bound


def generation(shape: ModelShape, work: Work, engine: Engine, gpu: Gpu, assumed: Assumed) -> Part:
    """Prefill of each prompt once, then decoding in full batches for the mean length, then the longest completion alone."""
    copies = max(1, engine.gpus // engine.tensor_parallel)
    matmul, attention = forward_flops(shape, work.prompts * work.prompt_tokens, work.prompt_tokens)
    prefill = (matmul + attention) / (min(copies, work.prompts) * engine.tensor_parallel * gpu.flops * assumed.mfu)
    share = math.ceil(work.rollouts / copies)
    rows = min(share, rows_at_once(shape, work, engine))
    context = work.prompt_tokens + work.completion_tokens / 2
    one, bound = decode_step(shape, rows, context, engine.tensor_parallel, gpu, assumed)
    last, _ = decode_step(shape, 1, work.prompt_tokens + work.completion_limit, engine.tensor_parallel, gpu, assumed)
    tail = (work.completion_limit - work.completion_tokens) * last
    seconds = prefill + share / rows * work.completion_tokens * one + tail
    return Part("generation", seconds, f"{bound}; {rows} rows at once in {copies} cop{'y' if copies == 1 else 'ies'}")


def rows_at_once(shape: ModelShape, work: Work, engine: Engine) -> int:
    """Sequences of mean length whose keys and values fit a copy's cache (it is paged); 0 where not one of full length does."""
    if engine.rows is not None:
        return engine.rows
    slots = engine.cache_bytes // cache_bytes_per_token(shape)
    if slots < work.prompt_tokens + work.completion_limit:
        return 0
    return slots // (work.prompt_tokens + work.completion_tokens)


def sync(shape: ModelShape, engine: Engine, sharding: Sharding, gpu: Gpu, gpus: int) -> Part:
    """New weights (an adapter alone, where there is one) to the engine, in 16 bits."""
    size = 2 * (shape.trainable if shape.trainable < shape.parameters else shape.parameters)
    gather = collective_seconds(size, sharding.ways("weights", gpus, gpu.node), gpu)
    if engine.kind == "local":
        if not sharding.gathers:
            return Part("sync", 0.0, "the engine has the trainer's weights")
        whole = collective_seconds(4 * shape.parameters, sharding.ways("weights", gpus, gpu.node), gpu)
        return Part("sync", whole, "the weights are gathered, in 32 bits")
    if engine.kind == "vllm_colocate":
        return Part("sync", gather + size / (gpu.bandwidth * COLLECTIVE_EFFICIENCY), "a copy in the GPU's memory")
    if engine.transfer == "nccl":
        return Part("sync", gather + size / (gpu.network * COLLECTIVE_EFFICIENCY), "one network card")
    return Part("sync", gather + 2 * size / DISK, "files: written, then read")
