"""The fingerprint's closed forms: what it must not depend on, and what it must see."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from llmrl.rollout import fingerprint as module
from llmrl.rollout.fingerprint import Fingerprint, fingerprint

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool)


def total(*tensors: torch.Tensor) -> int:
    return fingerprint(tensors).sum


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * 3).to(dtype)


def test_of_known_bits():
    # 1.0 is 0x3F800000 in float32 and 0x3F80 in bfloat16; -0.0 is the smallest signed integer, not zero.
    assert fingerprint([torch.ones(3)]) == Fingerprint(1, 12, 3 * 0x3F800000)
    assert fingerprint([torch.ones(3, dtype=torch.bfloat16)]) == Fingerprint(1, 6, 3 * 0x3F80)
    assert total(torch.tensor([-0.0])) == 2**64 - 2**31
    assert fingerprint([torch.tensor([-1, 2])]) == Fingerprint(1, 16, 1)
    assert fingerprint([]) == Fingerprint()


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_sum_of_signed_bit_patterns(dtype):
    tensor = random(5, 7, dtype=dtype)
    raw = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    integers = np.frombuffer(raw, dtype=f"<i{tensor.element_size()}").astype(object)
    assert total(tensor) == sum(integers.tolist()) % 2**64
    assert fingerprint([tensor]).bytes == len(raw)


@pytest.mark.parametrize("dtype", DTYPES)
def test_does_not_depend_on_the_layout(dtype):
    a, b = random(6, 4, dtype=dtype), random(2, 4, dtype=dtype)
    whole = total(a, b)
    assert total(torch.cat([a, b])) == whole, "fused"
    assert total(b, *a.split(1)) == whole, "split, in another order"
    assert total(a.T, b.T.contiguous()) == whole, "transposed, contiguous or not"
    assert total(torch.cat([a, torch.zeros(9, 4, dtype=dtype)]), b) == whole, "padded with zeros"


def test_parts_add_up():
    a, b = random(3, 3), random(5)
    assert fingerprint([a]) + fingerprint([b]) == fingerprint([a, b])
    assert Fingerprint(1, 8, 2**64 - 1) + Fingerprint(2, 4, 3) == Fingerprint(3, 12, 2)


def test_of_empty_and_of_single_numbers():
    assert fingerprint([torch.empty(0, 4)]) == Fingerprint(1, 0, 0)
    assert fingerprint([torch.tensor(2.0)]) == Fingerprint(1, 4, 0x40000000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sees_each_flipped_bit(dtype):
    tensor = random(3, 3, dtype=dtype)
    integer = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    before = total(tensor)
    for bit in range(8 * tensor.element_size()):
        other = tensor.clone()
        flip = 1 << bit if bit < 8 * tensor.element_size() - 1 else -(1 << bit)
        other.view(integer)[1, 2] ^= flip
        assert total(other) != before, f"bit {bit}"


def test_sees_a_cast():
    assert total(random(4)) != total(random(4).bfloat16())


def test_large_tensors_are_summed_in_parts(monkeypatch):
    tensor = random(1000)
    whole = total(tensor)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert total(tensor) == whole


def test_json_keeps_all_bits():
    value = Fingerprint(3, 12, 2**64 - 5)
    assert Fingerprint.from_json(json.loads(json.dumps(value.to_json()))) == value
