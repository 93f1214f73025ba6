"""Sums, gathers and barriers over the processes; in one process they are the identity. Nothing is ever pickled.

Each one raises LostProcessError, which says where every process stands, when another process is lost or does not come in time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, overload

import torch
import torch.distributed as dist

from llmrl.train.standing import Standing

_NCCL_MARGIN = timedelta(seconds=60)


def transport_timeout(seconds: float, device_type: str) -> timedelta:
    """What a process group is given. NCCL's own watchdog aborts the process: `Standing` must have spoken and ended it before."""
    return timedelta(seconds=seconds) + (_NCCL_MARGIN if device_type == "cuda" else timedelta())


class Collectives:
    """`rank` of `world_size` processes; `device` is where the tensors of `group` (None: the default process group) live."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        standing: Standing | None = None,
    ) -> None:
        self.rank, self.world_size, self.device, self.group = rank, world_size, device, group
        self.standing = standing or Standing(rank, world_size)

    def second_channel(self) -> Collectives:
        """Collectives of their own, over gloo, for a thread beside the one that uses these; all processes must make it.

        On one group, what two threads send is told apart by the order alone, which differs from process to process.
        """
        if self.world_size == 1:
            return Collectives(self.rank, self.world_size, torch.device("cpu"), standing=self.standing)
        group = dist.new_group(backend="gloo", timeout=transport_timeout(self.standing.timeout, "cpu"))
        return Collectives(self.rank, self.world_size, torch.device("cpu"), group, self.standing)

    @overload
    def global_sum(self, values: torch.Tensor) -> torch.Tensor: ...
    @overload
    def global_sum(self, values: Sequence[float]) -> list[float]: ...
    def global_sum(self, values: torch.Tensor | Sequence[float]) -> torch.Tensor | list[float]:
        """The element-wise sum over all processes, in float64; a tensor for a tensor, a list for a list."""
        is_tensor = isinstance(values, torch.Tensor)
        if not is_tensor and self.world_size == 1:
            return [float(v) for v in values]
        total = torch.as_tensor(values, dtype=torch.float64).detach().clone()
        if self.world_size > 1:
            home = total.device
            with self.standing.during("global_sum", waits=True):
                total = total.to(self.device)
                dist.all_reduce(total, group=self.group)
                total = total.to(home)
        return total if is_tensor else total.tolist()

    def global_max(self, value: int) -> int:
        """The largest of the processes' integers."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device=self.device)
        with self.standing.during("global_max", waits=True):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
            return int(tensor)

    def gather_json(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank, on every process. Values are what JSON can hold, NaN and infinity included."""
        if self.world_size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        with self.standing.during("gather_json", waits=True):
            return self._gather_bytes(mine)

    def _gather_bytes(self, mine: torch.Tensor) -> list[Any]:
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)], dtype=torch.int64, device=self.device), group=self.group)
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        return [json.loads(part[:n].cpu().numpy().tobytes()) for part, n in zip(parts, lengths)]

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's `value` on every process."""
        if self.world_size == 1:
            return value
        with self.standing.during("broadcast_json", waits=True):
            return self._broadcast_bytes(json.dumps(value).encode() if self.rank == 0 else b"")

    def _broadcast_bytes(self, data: bytes) -> Any:
        size = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, src=0, group=self.group)
        buffer = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(buffer, src=0, group=self.group)
        return json.loads(buffer.cpu().numpy().tobytes())

    def barrier(self, timeout: timedelta | None = None) -> None:
        """Waits for all processes, `collective_timeout` at most. Raises LLMRLError when one does not come in time."""
        if self.world_size == 1:
            return
        with self.standing.during("barrier", waits=True):
            if dist.get_backend(self.group) == "gloo":
                within = timeout or timedelta(seconds=self.standing.timeout)
                dist.monitored_barrier(
                    self.group, timeout=within, wait_all_ranks=True
                )  # names the ranks that are missing
            else:
                dist.barrier(group=self.group)


def reduce_stats(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """One value a name: `*/min` and `*/max` by minimum and maximum, others by an exactly rounded sum. NaN stays NaN.

    `math.fsum` makes the sum independent of the order and of how an update was cut, up to the terms themselves.
    """
    values: dict[str, list[float]] = {}
    for part in parts:
        for name, items in part.items():
            values.setdefault(name, []).extend(items)
    return {name: _reduce(name, items) for name, items in values.items()}


def _reduce(name: str, items: list[float]) -> float:
    if any(math.isnan(v) for v in items):
        return math.nan
    if name.endswith("/min"):
        return min(items)
    if name.endswith("/max"):
        return max(items)
    if any(math.isinf(v) for v in items):
        return sum(items)  # fsum refuses inf - inf
    return math.fsum(items)
