"""The optimizer's state in safetensors files that any number of processes wrote and any other number reads.

Each process writes the rows of each tensor that it holds; the header says which rows of how many they are. So a run that was sharded
over two processes continues on one or on eight, under DDP, FSDP2 or ZeRO alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmrl.errors import ConfigError

_STEM = "optimizer"


@dataclass(frozen=True)
class Piece:
    """The rows `first` .. `first + len(tensor)` of the state `key` of parameter `name`, which has `rows` of them (None: the whole)."""

    name: str
    key: str
    tensor: Tensor
    first: int = 0
    rows: int | None = None


def held(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces in host memory; gathering them may need all processes, writing them does not."""
    # Copies, not views: safetensors refuses tensors that share memory.
    return [replace(p, tensor=p.tensor.detach().to("cpu", copy=True).contiguous()) for p in pieces]


def write_pieces(directory: Path, pieces: Sequence[Piece], writer: int = 0, writers: int = 1) -> list[Path]:
    """Writes the pieces of process `writer` of so many that write; returns the file that it made, if it had any."""
    tensors = {f"{piece.name}:{piece.key}": piece.tensor for piece in pieces}
    if not tensors:
        return []
    rows = {f"{piece.name}:{piece.key}": [piece.first, piece.rows] for piece in pieces if piece.rows is not None}
    suffix = f"_{writer:05d}_of_{writers:05d}" if writers > 1 else ""
    path = directory / f"{_STEM}{suffix}.safetensors"
    save_file(tensors, path, metadata={"rows": json.dumps(rows)})
    return [path]


class OptimizerReader:
    """The optimizer's state of a checkpoint. Files are mapped into memory: a process reads the rows that it asks for.

    Raises ConfigError where there are no files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        paths = sorted(directory.glob(f"{_STEM}*.safetensors"))
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._where: dict[str, dict[str, list[tuple[int, int | None, Any]]]] = {}
        for file in self._files:
            rows = json.loads((file.metadata() or {}).get("rows", "{}"))
            for full in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                name, _, key = full.rpartition(":")
                first, count = rows.get(full, (0, None))
                self._where.setdefault(name, {}).setdefault(key, []).append((first, count, file))

    def keys(self, name: str) -> list[str]:
        """What is kept of a parameter: `exp_avg`, `exp_avg_sq`, `step`; empty for one that has had no step."""
        return list(self._where.get(name, {}))

    def whole(self, name: str, key: str) -> Tensor:
        """The whole tensor."""
        places = sorted(self._where[name][key], key=lambda place: place[0])
        parts = [file.get_tensor(f"{name}:{key}") for _, _, file in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, name: str, key: str, first: int, stop: int) -> Tensor:
        """Rows first .. stop of a tensor."""
        parts = []
        for start, _, file in sorted(self._where[name][key], key=lambda place: place[0]):
            view = file.get_slice(f"{name}:{key}")
            low, high = max(first, start), min(stop, start + view.get_shape()[0])
            if low < high:
                parts.append(view[low - start : high - start])
        return torch.cat(parts) if parts else self.whole(name, key)[:0]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ConfigError unless all that is kept belongs to parameters of these names and shapes."""
        problems = []
        for name, keys in self._where.items():
            if name not in shapes:
                problems.append(f"{name} is not a trainable parameter here")
                continue
            for key in keys.keys() & {"exp_avg", "exp_avg_sq", "state1", "state2"}:
                if (kept := self._shape(name, key)) != shapes[name]:
                    problems.append(f"{name} is {shapes[name]} here and {kept} in the checkpoint")
                    break
        if problems:
            raise ConfigError(
                "the checkpoint's optimizer state does not belong to this model: " + "; ".join(problems[:5])
                + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
                + ". Resume with the model and the LoRA settings that the run began with"
            )  # fmt: skip

    def _shape(self, name: str, key: str) -> tuple[int, ...]:
        _, rows, file = self._where[name][key][0]
        shape = tuple(file.get_slice(f"{name}:{key}").get_shape())
        return shape if rows is None else (rows, *shape[1:])
