"""A toy model and recipe for the tests of training: what matters here is the plumbing, not the model."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from llmrl.config.base import Recipe
from llmrl.config.model import ModelFields
from llmrl.config.train import TrainFields


class ToyConfig(Recipe, ModelFields, TrainFields):
    """A recipe without data."""

    kind: ClassVar[str] = "toy"


def toy_config(output_dir: Path | str, **settings: Any) -> ToyConfig:
    return ToyConfig(**{"model_name_or_path": "toy", "output_dir": str(output_dir), "learning_rate": 0.1, **settings})


class Toy(nn.Module):
    """Token -> regression value, with dropout, a norm and a bias."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(17, 8, dtype=dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 1, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.norm(self.embed(tokens)))).squeeze(-1)


Batch = tuple[torch.Tensor, torch.Tensor]  # tokens [K], weights [K]


def batches_of(lengths: list[int], total: int, seed: int = 0) -> list[Batch]:
    """Microbatches of these lengths whose weights are 1 / total."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for n in lengths:
        out.append(
            (torch.randint(0, 17, (n,), generator=generator), torch.full((n,), 1.0 / total, dtype=torch.float64))
        )
    return out


def empty_batch() -> Batch:
    return torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)


def toy_loss(module: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
    tokens, weights = batch
    error = (module(tokens) - torch.sin(tokens.double())) ** 2
    loss = (weights * error).sum()
    return loss, {"loss": loss, "tokens": len(tokens), "error/min": error.min(), "error/max": error.max()}


def run_processes(target: Callable[..., None], world_size: int, *args: Any, timeout: float = 120.0) -> None:
    """Runs `target(*args)` in `world_size` fresh processes with the environment that torchrun gives; fails when one fails.

    `target` must be a module-level function; a rank learns who it is from the environment.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    errors = context.Queue()
    processes = [
        context.Process(target=_enter, args=(target, rank, world_size, port, errors, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    failed = [p for p in processes if p.exitcode != 0]
    for process in processes:
        if process.is_alive():
            process.kill()
    text = "" if errors.empty() else errors.get()
    assert not failed, f"exit codes {[p.exitcode for p in processes]}\n{text}"


def _enter(target: Callable[..., None], rank: int, world_size: int, port: int, errors: Any, args: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        target(*args)
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        errors.close()
        errors.join_thread()
        raise
