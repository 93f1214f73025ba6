"""A toy model and recipe for the tests of training: what matters here is the plumbing, not the model."""

from __future__ import annotations

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
