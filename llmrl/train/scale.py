"""Memory of one GPU when a run is spread over many: the terms of train/memory.py, divided as each way of sharding divides them.

docs/scale.md has the formulas, their sources, and what they leave out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmrl.config.model import ModelFields
from llmrl.models.shape import ModelShape
from llmrl.train.gpus import Gpu
from llmrl.train.memory import BYTES, MemoryEstimate, Term, estimate_memory

USABLE = 0.9  # of a GPU's memory; the rest is the CUDA context, NCCL's buffers and fragmentation
MOST_GPUS = 4096
HEAD_CHUNK_BYTES = 2**29  # of functional/logprobs.py on a GPU


@dataclass(frozen=True)
class Sharding:
    """Which of weights and optimizer state are spread over the processes. `unit`: of how many each part is kept once.

    "one": every process has all of it; "node": once a machine; "all": once over all processes. Gradients go with the optimizer.
    """

    name: str
    weights: str
    optimizer: str
    what: str

    def ways(self, part: str, gpus: int, node: int) -> int:
        """Over how many processes `part` ("weights" or "optimizer") is spread."""
        unit = self.weights if part == "weights" else self.optimizer
        return {"one": 1, "node": min(gpus, node), "all": gpus}[unit]

    @property
    def gathers(self) -> bool:
        """Weights are put together layer by layer, in forward and backward."""
        return self.weights != "one"


SHARDINGS = (
    Sharding("ddp", "one", "one", "everything on every GPU"),
    Sharding("zero2", "one", "all", "weights on every GPU; gradients, master weights and moments sharded"),
    Sharding("fsdp2-hybrid", "node", "node", "everything sharded within a machine, copied between machines"),
    Sharding("fsdp2", "all", "all", "everything sharded over all GPUs"),
    Sharding("zero3", "all", "all", "everything sharded over all GPUs"),
)


@dataclass(frozen=True)
class Load:
    """What decides about memory beside the model: sizes of one process, in tokens, rows and bytes.

    engine_bytes, engine_phase: of a colocated vLLM, and when it holds them ("sampling" where it sleeps while training, else "always").
    """

    microbatch_tokens: int
    cache_tokens: int = 0
    decode_rows: int = 0
    reward_model_bytes: int = 0
    engine_bytes: int = 0
    engine_phase: str = "sampling"


def sharded_memory(
    config: ModelFields,
    shape: ModelShape,
    load: Load,
    sharding: Sharding,
    gpus: int,
    *,
    node: int = 8,
    critic: ModelShape | None = None,
) -> MemoryEstimate:
    """The terms of `estimate_memory` for one of `gpus` training processes, `node` of which share a machine.

    Under sharded weights two layers, and embedding and head, are whole at a time; FSDP2 gathers layers in the type that is computed in,
    which takes the place of autocast's copies. ZeRO-2 keeps weights whole and masters of what is trained sharded. The local engine
    samples from a plain copy of sharded weights.
    """
    base = estimate_memory(
        config,
        shape,
        microbatch_tokens=load.microbatch_tokens,
        head_chunk_bytes=max(HEAD_CHUNK_BYTES, 16 * shape.vocab * 4),
        cache_tokens=load.cache_tokens,
        decode_rows=load.decode_rows,
        critic=critic,
        reward_model_bytes=load.reward_model_bytes,
    )
    terms = list(spread(base, config, shape, sharding, gpus, node=node, critic=critic).terms)
    if load.engine_bytes:
        when = "weights and key-value cache of vLLM in this process"
        terms.append(Term("vLLM", load.engine_bytes, load.engine_phase, when))
    return MemoryEstimate(tuple(terms))


def spread(
    base: MemoryEstimate,
    config: ModelFields,
    shape: ModelShape,
    sharding: Sharding,
    gpus: int,
    *,
    node: int = 8,
    critic: ModelShape | None = None,
) -> MemoryEstimate:
    """What becomes of the terms of a process that has everything when it is one of `gpus`."""
    terms = []
    for term in base.terms:
        whose, _, kind = term.name.rpartition(": ")
        its = critic if whose and critic is not None else shape
        for part in _spread(config, its, replace(term, name=kind), sharding, gpus, node):
            terms.append(replace(part, name=f"{whose}: {part.name}" if whose else part.name))
    return MemoryEstimate(tuple(terms))


def _spread(
    config: ModelFields, shape: ModelShape, term: Term, sharding: Sharding, gpus: int, node: int
) -> Iterator[Term]:
    """What becomes of one term of a single process."""
    weights, optimizer = (sharding.ways(part, gpus, node) for part in ("weights", "optimizer"))
    gathers = sharding.gathers and weights > 1
    width = BYTES[config.dtype]
    if term.name == "weights":
        yield _divided(term, weights)
        if sharding.name == "zero2":
            yield _divided(Term("master weights", shape.trainable * width, "always", "of what is trained"), optimizer)
        if gathers:
            yield _gathered(config, shape, width, sharding)
    elif term.name == "reference":
        yield _divided(term, weights)
    elif term.name in ("optimizer", "gradients"):
        yield _divided(term, optimizer)
    elif term.name == "autocast" and gathers:
        if sharding.name == "zero3":
            few = replace(term, bytes=4 * shape.layer_parameters, why="16-bit copies of two layers")
            yield few if config.gradient_checkpointing else term
    else:
        yield term
    if term.name == "key-value cache" and gathers:
        layers = shape.layers * shape.layer_parameters
        size = layers * _layer_bytes(config, sharding) + (shape.parameters - layers) * width
        yield Term("copy to sample from", size, "sampling", "whole weights, gathered once a step")


def _divided(term: Term, ways: int) -> Term:
    if ways == 1:
        return term
    return replace(term, bytes=math.ceil(term.bytes / ways), why=f"{term.why}; 1/{ways} of it")


def _layer_bytes(config: ModelFields, sharding: Sharding) -> int:
    """Of a parameter of a layer that was put together."""
    mixed = config.mixed_precision != "no"
    return 2 if mixed and sharding.name != "zero3" else BYTES[config.dtype]


def _gathered(config: ModelFields, shape: ModelShape, width: int, sharding: Sharding) -> Term:
    """Two layers (one is fetched while the other is used), what is outside of layers, and a layer's gradients on their way."""
    outside = shape.parameters - shape.layers * shape.layer_parameters
    trained = shape.trainable / shape.parameters
    size = 2 * shape.layer_parameters * _layer_bytes(config, sharding) + outside * width
    size += int(shape.layer_parameters * trained) * width
    return Term("gathered layers", size, "training", "two layers, embedding and head whole; a layer's gradients")


def usable(gpu: Gpu) -> int:
    """Bytes that a plan may fill."""
    return int(USABLE * gpu.memory)


def smallest(gpu: Gpu, peak_at: Any) -> int | None:
    """The least number of GPUs at which `peak_at(gpus)` fits: 1, 2, 4, then whole machines; None where no number does."""
    for gpus in counts(gpu):
        if peak_at(gpus) <= usable(gpu):
            return gpus
    return None


def counts(gpu: Gpu) -> Iterator[int]:
    """Numbers of GPUs that are worth considering, rising."""
    part = 1
    while part < gpu.node:
        yield part
        part *= 2
    machines = 1
    while machines * gpu.node <= MOST_GPUS:
        yield machines * gpu.node
        machines += 1
