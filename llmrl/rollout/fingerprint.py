"""A number for a set of weights that trainer and server can both compute, although they lay their tensors out differently."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**20
"""Elements summed at once: torch widens them to int64 first, which must stay small beside a server's full memory; and in the host's
caches it is six times faster."""


@dataclass(frozen=True)
class Fingerprint:
    """`count` tensors of `bytes` together, and the sum of their elements' bit patterns, read as signed integers, modulo 2^64.

    The sum does not depend on how tensors are fused, split, transposed or padded with zeros, so the parameters in an engine's memory
    have the sum of those that were sent (`count` and `bytes` need not agree). Order is invisible to it: log-probs prove the rest.
    """

    count: int = 0
    bytes: int = 0
    sum: int = 0

    def __add__(self, other: Fingerprint) -> Fingerprint:
        return Fingerprint(self.count + other.count, self.bytes + other.bytes, (self.sum + other.sum) % 2**64)

    @property
    def hex(self) -> str:
        return f"{self.sum:016x}"

    def to_json(self) -> dict[str, Any]:
        """The sum as hexadecimal text, since JSON readers round large numbers."""
        return {**asdict(self), "sum": self.hex}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Fingerprint:
        return cls(int(data["count"]), int(data["bytes"]), int(data["sum"], 16))


def fingerprint(tensors: Iterable[torch.Tensor]) -> Fingerprint:
    """The fingerprint of some tensors of any shapes, 1, 2, 4 or 8 bytes an element; reads each on its device and waits for the
    devices once, at the end."""
    count = size = 0
    sums = []
    for tensor in tensors:
        count += 1
        size += tensor.numel() * tensor.element_size()
        integers = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        sums += [part.sum(dtype=torch.int64) for part in integers.split(_CHUNK)]
    return Fingerprint(count, size, sum(int(s) for s in sums) % 2**64)
