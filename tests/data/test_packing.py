"""Cutting and packing: units whole, budgets kept, every token once, payloads as they were."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from llmrl.data.packing import cut, empty_example, pack, shard
from llmrl.errors import DataError
from llmrl.types import Example


def example(n: int, unit: int = 0, start: int = 0, **payload: np.ndarray) -> Example:
    mask = np.ones(n, dtype=bool)
    mask[0] = False
    return Example(np.arange(start, start + n, dtype=np.int32), mask, unit=unit, payload=payload, id=f"{unit}/{start}")


def random_examples(rng: np.random.Generator, n: int, units: int) -> list[Example]:
    return [example(int(rng.integers(1, 40)), unit=int(rng.integers(units)), start=1000 * i) for i in range(n)]


@pytest.mark.parametrize("seed", range(20))
def test_cut_keeps_units_whole_and_budgets(seed):
    rng = np.random.default_rng(seed)
    examples = random_examples(rng, int(rng.integers(1, 60)), int(rng.integers(1, 40)))
    budget = int(rng.integers(1, 120))
    batches = cut(examples, budget)
    assert sorted(e.id for b in batches for e in b) == sorted(e.id for e in examples)
    homes: dict[int, set[int]] = {}
    for i, batch in enumerate(batches):
        assert sum(map(len, batch)) <= budget or len({e.unit for e in batch}) == 1
        for e in batch:
            homes.setdefault(e.unit, set()).add(i)
    assert all(len(places) == 1 for places in homes.values())
    assert [[e.id for e in b] for b in cut(examples, budget)] == [[e.id for e in b] for b in batches]


@pytest.mark.parametrize("seed", range(5))
def test_cut_is_near_the_lower_bound(seed):
    rng = np.random.default_rng(seed)
    examples = [example(int(n), unit=i) for i, n in enumerate(rng.integers(20, 600, size=400))]
    tokens = sum(map(len, examples))
    assert len(cut(examples, 2048)) <= 1.03 * tokens / 2048 + 1


def test_cut_fills_exactly():
    sizes = [6, 5, 4, 3, 2]  # 6+4 and 5+3+2 fill two microbatches of 10
    batches = cut([example(n, unit=i) for i, n in enumerate(sizes)], 10)
    assert sorted(sorted(len(e) for e in b) for b in batches) == [[2, 3, 5], [4, 6]]


def test_cut_of_a_step_takes_milliseconds():
    rng = np.random.default_rng(0)
    examples = [example(int(n), unit=i) for i, n in enumerate(rng.integers(20, 600, size=4096))]
    start = time.process_time()
    cut(examples, 2048)
    assert time.process_time() - start < 0.5


def test_cut_edge_cases():
    assert cut([], 8) == []
    assert [len(b) for b in cut([example(100, 0), example(100, 0), example(3, 1)], 10)] == [2, 1]
    with pytest.raises(DataError, match="tokens_per_microbatch is 0"):
        cut([example(3)], 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shards_are_a_balanced_partition(world_size):
    examples = random_examples(np.random.default_rng(0), 80, 40)
    parts = [shard(examples, r, world_size) for r in range(world_size)]
    assert sorted(e.id for p in parts for e in p) == sorted(e.id for e in examples)
    assert sum(len({e.unit for e in p}) for p in parts) == len({e.unit for e in examples})
    loads = [sum(map(len, p)) for p in parts]
    heaviest = max(sum(len(e) for e in examples if e.unit == u) for u in range(40))
    assert max(loads) - min(loads) <= heaviest


def test_shard_with_fewer_units_than_processes():
    assert [len(shard([example(5)], r, 3)) for r in range(3)] == [1, 0, 0]


def test_pack_shapes_and_values():
    a, b = example(2, unit=4, start=5), example(3, unit=9, start=7)
    batch = pack([a, b])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9] and batch.input_ids.dtype == torch.int64
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 5] and batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens_host == (0, 2, 5) and batch.max_seqlen == 3
    assert batch.unit_ids.tolist() == [4, 9]
    assert batch.loss_mask.tolist() == [False, True, False, True, True]
    assert batch.sequence_of_positions().tolist() == [0, 1, 1]
    assert (batch.num_tokens, batch.num_sequences) == (5, 2)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_pack_keeps_payload_dtype_and_bits(dtype):
    values = (np.pi * np.arange(7)).astype(dtype)
    batch = pack([example(3, x=values[:3]), example(4, x=values[3:])])
    assert batch.payload["x"].numpy().dtype == dtype
    assert batch.payload["x"].numpy().tobytes() == values.tobytes()


def test_nan_at_masked_positions_is_carried_but_not_selected():
    values = np.array([np.nan, 1.0, np.nan, 2.0])
    e = Example(np.arange(4, dtype=np.int32), np.array([False, True, False, True]), payload={"a": values})
    batch = pack([e, e])
    assert torch.isnan(batch.payload["a"]).sum() == 4
    assert batch.select("a").tolist() == [1.0, 2.0, 1.0, 2.0]


def test_pack_does_not_alias_the_examples():
    e = example(3, x=np.zeros(3, np.float32))
    pack([e]).payload["x"].fill_(7)
    assert e.payload["x"].tolist() == [0, 0, 0]


def test_empty_example_packs_with_zero_weight():
    batch = pack([empty_example(["weights"]), empty_example({"weights": np.float32})])
    assert batch.select("weights").tolist() == [0.0, 0.0] and batch.num_tokens == 4
    assert pack([empty_example({"weights": np.float64})]).payload["weights"].dtype == torch.float64
    assert pack([empty_example()]).payload == {}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: [], "no examples"),
        (lambda: [example(3, x=np.zeros(3)), example(3)], "has payloads"),
        (lambda: [example(3, x=np.zeros(3)), example(3, x=np.zeros(3, np.float32))], "float32, others are float64"),
        (lambda: [example(3, x=np.zeros(2))], "shape"),
        (lambda: [Example(np.array([1, 2], np.int32), np.array([True, True]))], "nothing predicts it"),
        (lambda: [Example(np.array([1, 2], np.int32), np.array([False, True, True]))], "not bool"),
        (lambda: [Example(np.array([1, 2], np.int32), np.array([0, 1]))], "not bool"),
        (lambda: [Example(np.array([], np.int32), np.array([], bool))], "no tokens"),
    ],
)
def test_pack_refuses(bad, message):
    with pytest.raises(DataError, match=message):
        pack(bad())
