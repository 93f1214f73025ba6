"""Examples -> microbatches -> `PackedBatch`: no padding, units kept whole, nothing depends on chance or arrival order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llmrl.errors import DataError
from llmrl.types import Example, PackedBatch


def cut(examples: Sequence[Example], tokens_per_microbatch: int) -> list[list[Example]]:
    """Distributes examples over microbatches of at most `tokens_per_microbatch` tokens, cutting between units only.

    Best-fit decreasing: units, longest first, each into the fullest microbatch that still has room (at most 11/9 of the
    fewest possible, plus one; Johnson et al. 1974). A unit over the budget gets a microbatch of its own. The result depends
    on nothing but the arguments: equal lengths keep their order, and so do the examples inside a microbatch.
    """
    if tokens_per_microbatch < 1:
        raise DataError(f"tokens_per_microbatch is {tokens_per_microbatch}; it must be at least 1")
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for cost, members in _units_by_cost(examples):
        place = bisect_left(room, (cost, -1))
        if place < len(room):
            free, index = room.pop(place)
        else:
            free, index = max(tokens_per_microbatch, cost), len(bins)
            bins.append([])
        bins[index] += members
        insort(room, (free - cost, index))
    return [[examples[i] for i in sorted(members)] for members in bins]


def shard(examples: Sequence[Example], rank: int, world_size: int, attention: float = 0.0) -> list[Example]:
    """The part of `examples` that process `rank` of `world_size` trains on, in the original order.

    Every process calls this with the same examples. Units, dearest first, go to the process with the least work so far; units
    stay whole. With few units a process may get none. For `attention` see `work`.
    """
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not in 0..{world_size - 1}")
    if world_size == 1:
        return list(examples)
    loads = [0.0] * world_size
    mine: list[int] = []
    for cost, members in _units_by_cost(examples, attention):
        target = loads.index(min(loads))
        loads[target] += cost
        if target == rank:
            mine += members
    return [examples[i] for i in sorted(mine)]


def pack(examples: Sequence[Example], device: str | torch.device = "cpu") -> PackedBatch:
    """Lays examples end to end. T is the sum of their lengths, N their number; payloads keep their dtype.

    Raises DataError when there is nothing to pack, when an array's length is not the number of tokens, when a first token is in
    the loss (nothing predicts it, so it would be scored from the sequence before it), when payload or scalar names or dtypes
    differ, or when a prefix is longer than the first example of its unit.
    """
    if not examples:
        raise DataError("pack got no examples; a process without work packs an empty_example")
    for example in examples:
        _check(example, examples[0])
    lengths = np.array([len(e) for e in examples], dtype=np.int64)
    ends = np.cumsum(lengths)
    cu_seqlens = np.concatenate([[0], ends])
    shared = np.array([e.prefix for e in examples], dtype=np.int64)
    positions = np.arange(ends[-1], dtype=np.int64) + np.repeat(shared - cu_seqlens[:-1], lengths)
    prefixes = _prefixes(examples, cu_seqlens.tolist()) if shared.any() else ()

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    return PackedBatch(
        input_ids=tensor(np.concatenate([e.input_ids for e in examples]).astype(np.int64)),
        position_ids=tensor(positions),
        cu_seqlens=tensor(cu_seqlens.astype(np.int32)),
        cu_seqlens_host=tuple(cu_seqlens.tolist()),
        max_seqlen=int((lengths + shared).max()),
        unit_ids=tensor(np.array([e.unit for e in examples], dtype=np.int64)),
        loss_mask=tensor(np.concatenate([e.loss_mask for e in examples])),
        payload={name: tensor(np.concatenate([e.payload[name] for e in examples])) for name in examples[0].payload},
        scalars={
            name: tensor(np.array([e.scalars[name] for e in examples], np.float32)) for name in examples[0].scalars
        },
        prefixes=prefixes,
    )


def empty_example(payload: Iterable[str] | Mapping[str, Any] = (), scalars: Iterable[str] = ()) -> Example:
    """Two tokens, the second in the loss, every payload and scalar 0: what a process without work runs, so that collectives match.

    `payload` names the arrays (float32), or maps names to dtypes. `weights`, of tokens or sequences, must be among them wherever
    a loss is made: at 0 they take the example out of it.
    """
    dtypes = payload if isinstance(payload, Mapping) else dict.fromkeys(payload, np.float32)
    return Example(
        input_ids=np.zeros(2, dtype=np.int32),
        loss_mask=np.array([False, True]),
        payload={name: np.zeros(2, dtype=dtype) for name, dtype in dtypes.items()},
        scalars=dict.fromkeys(scalars, 0.0),
    )


def empty_pair(payload: Iterable[str] | Mapping[str, Any] = (), scalars: Iterable[str] = ()) -> list[Example]:
    """Two `empty_example`s of one unit, where losses are made of pairs."""
    return [empty_example(payload, scalars)] * 2


def unshared(examples: Sequence[Example]) -> list[Example]:
    """The examples with each prefix written out, its tokens not in the loss and its payload 0."""
    trunks: dict[int, Example] = {}
    out = []
    for e in examples:
        trunk = trunks.setdefault(e.unit, e)
        if e.prefix:
            pad = {n: np.concatenate([np.zeros(e.prefix, v.dtype), v]) for n, v in e.payload.items()}
            ids = np.concatenate([trunk.input_ids[: e.prefix], e.input_ids])
            mask = np.concatenate([np.zeros(e.prefix, dtype=bool), e.loss_mask])
            e = replace(e, input_ids=ids, loss_mask=mask, payload=pad, prefix=0)
        out.append(e)
    return out


def work(tokens: int, prefix: int = 0, attention: float = 0.0) -> float:
    """What training on a sequence takes, in tokens without attention: L + attention * L (2 P + L) behind a prefix of P tokens.

    `attention` is what a pair of tokens adds, relative to a token's products with the weights: see `ModelShape.attention_share`.
    """
    return tokens + attention * tokens * (2 * prefix + tokens)


def _units_by_cost(examples: Sequence[Example], attention: float = 0.0) -> list[tuple[Any, list[int]]]:
    """(`work`: the tokens, without attention; indices of the examples) of each unit, dearest first; equal ones in order of first
    appearance."""
    units: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        units.setdefault(example.unit, []).append(i)
    costs = [len(e) if attention == 0.0 else work(len(e), e.prefix, attention) for e in examples]
    return sorted(((sum(costs[i] for i in m), m) for m in units.values()), key=lambda unit: -unit[0])


def _prefixes(examples: Sequence[Example], starts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(where the prefix starts, its length) a sequence: it is the beginning of the unit's first example."""
    trunks: dict[int, tuple[int, int]] = {}
    out = []
    for e, start in zip(examples, starts):
        trunk, length = trunks.setdefault(e.unit, (start, 0 if e.prefix else len(e)))
        if e.prefix > length:
            raise DataError(
                f"example {e.id or e.unit!r} has a prefix of {e.prefix} tokens, but the first example of its unit, which holds it, has "
                f"{length} in this batch; units must stay whole, their first example without a prefix"
            )
        out.append((trunk, e.prefix))
    return tuple(out)


def _check(example: Example, first: Example) -> None:
    name = f"example {example.id!r}" if example.id else f"an example of unit {example.unit}"
    n = len(example)
    if n == 0:
        raise DataError(f"{name} has no tokens")
    if example.loss_mask.shape != (n,) or example.loss_mask.dtype != np.bool_:
        raise DataError(f"{name}: loss_mask is {example.loss_mask.dtype} {example.loss_mask.shape}, not bool ({n},)")
    if example.loss_mask[0] and not example.prefix:
        raise DataError(f"{name}: the first token is in the loss, but nothing predicts it; set loss_mask[0] to False")
    if example.payload.keys() != first.payload.keys():
        raise DataError(f"{name} has payloads {sorted(example.payload)}, others have {sorted(first.payload)}")
    if example.scalars.keys() != first.scalars.keys():
        raise DataError(f"{name} has scalars {sorted(example.scalars)}, others have {sorted(first.scalars)}")
    for key, values in example.payload.items():
        if values.shape != (n,):
            raise DataError(f"{name}: payload {key!r} has shape {values.shape}, not ({n},)")
        if values.dtype != first.payload[key].dtype:
            raise DataError(f"{name}: payload {key!r} is {values.dtype}, others are {first.payload[key].dtype}")
