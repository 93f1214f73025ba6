"""What every trainer sets up alike: backend, model, tokenizer, the module that is wrapped, and the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrl.data.build import DataReport
from llmrl.data.packing import cut, pack, shard
from llmrl.errors import ConfigError
from llmrl.models.forward import PolicyModule
from llmrl.models.load import load_policy, load_weights, save_model, stop_token_ids
from llmrl.train.backend import Backend
from llmrl.train.run import Run
from llmrl.types import Example, PackedBatch


class Trainer:
    """Base of the trainers. `model` and `tokenizer` default to what the recipe names; a model that was handed in is trained in place."""

    kind: str
    report: DataReport | None = None
    eval_report: DataReport | None = None

    def __init__(self, config: Any, *, model: Any = None, tokenizer: Any = None, callbacks: Sequence[Any] = ()) -> None:
        if (model is None) != (tokenizer is None):
            raise ConfigError(
                "give both model and tokenizer, or neither: the stop tokens and the chat template must match the weights"
            )
        self.config = config
        self.callbacks = list(callbacks)
        self.backend = Backend(config)
        if model is None:
            model, tokenizer = load_policy(config, device=self.backend.device)
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = stop_token_ids(model, tokenizer)
        self.module = PolicyModule(model)

    def prepare(self, total_steps: int, updates_per_step: int, stateful: dict[str, Any]) -> None:
        """Wraps the module, builds the optimizer and opens the run directory; the last thing that a trainer's set-up does."""
        self.backend.prepare(self.module, total_updates=total_steps * updates_per_step)
        self.run = Run(
            self.config,
            self.backend,
            kind=self.kind,
            total_steps=total_steps,
            stateful=stateful,
            save_model=self.save_model,
            load_model=lambda path: load_weights(self.model, path),
            callbacks=self.callbacks,
            trainer=self,
        )
        for what, report in (("training", self.report), ("evaluation", self.eval_report)):
            if report is not None:
                self.run.progress.message(f"{what} data: {report.summary()}")

    def save_model(self, path: str | Path) -> None:
        """Writes the model (the adapter alone, for LoRA) and the tokenizer in the Hugging Face layout."""
        save_model(self.model, self.tokenizer, path)

    def microbatches(self, examples: Sequence[Example]) -> list[list[Example]]:
        """This process's examples, cut by the token budget."""
        return cut(examples, self.config.tokens_per_microbatch)

    def packed(self, examples: Sequence[Example]) -> PackedBatch:
        return pack(examples, device=self.backend.device)

    def share(self, examples: Sequence[Example]) -> list[Example]:
        """This process's part of examples that every process holds, balanced by cost."""
        return shard(examples, self.backend.rank, self.backend.world_size)


def require(condition: Any, message: str) -> None:
    if not condition:
        raise ConfigError(message)
