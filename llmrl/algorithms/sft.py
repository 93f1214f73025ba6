"""Supervised fine-tuning: maximise the likelihood of the supervised tokens, every one of an update with the same weight.

repeat: rows <- sampler;  loss = -(1/N) sum_t log p(token t),  N = supervised tokens of the update over all processes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from llmrl.algorithms.base import Trainer, require
from llmrl.config.sft import SFTConfig
from llmrl.data.build import build_sft_examples
from llmrl.data.packing import empty_example
from llmrl.data.sampler import Sampler
from llmrl.types import Example


class SFTTrainer(Trainer):
    """Fine-tunes a causal language model on rows of text, messages, or prompt and completion.

    `train_dataset` and `eval_dataset` take a list of rows, a `datasets.Dataset` or a list of `Example`, instead of the recipe's.

    Example:
        SFTTrainer(SFTConfig(model_name_or_path="m", dataset="rows.jsonl", output_dir="runs/sft")).train()
    """

    kind = "sft"

    def __init__(
        self,
        config: SFTConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_funcs: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        require(reward_funcs is None, "SFT has no rewards: reward_funcs belongs to GRPOTrainer")
        super().__init__(config, model=model, tokenizer=tokenizer, callbacks=callbacks)
        build = partial(build_sft_examples, tokenizer=self.tokenizer, config=config, stop_ids=self.stop_ids)
        self.examples, self.eval_examples = self.read_examples(train_dataset, eval_dataset, build)
        self.sampler = Sampler(len(self.examples), seed=config.seed, shuffle=config.shuffle)
        steps = config.max_steps or math.ceil(config.num_train_epochs * len(self.examples) / config.batch_size)
        self.prepare(steps, config.updates_per_step, {"sampler": self.sampler})

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary; the final model is in `<output_dir>/model`."""
        with self.benchmarks, self.run as run:
            for step in run.steps():
                rows = [self.examples[i] for i in self.sampler.take(self.config.batch_size)]
                parts = np.array_split(np.arange(len(rows)), min(self.config.updates_per_step, len(rows)))
                updates = [self.update([rows[i] for i in part]) for part in parts]
                metrics = {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]}
                metrics["learning_rate"] = updates[-1]["learning_rate"]
                if run.due(self.config.eval_steps, step):
                    metrics |= self.evaluate() | self.benchmarks.evaluate(step)
                metrics["epoch"] = self.sampler.epoch
                run.log(step, metrics, tokens=sum(map(len, rows)))
        return run.summary

    def update(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimizer step on `examples`, which every process holds; each takes its share."""
        mine = self._weighted(examples)
        stats = self.backend.update(
            self.microbatches(self.share(mine)), self._loss, lambda: [empty_example(["weights"])]
        )
        return {"loss": stats.sums["loss"], "grad_norm": stats.grad_norm, "learning_rate": stats.learning_rate}

    def evaluate(self) -> dict[str, float]:
        """eval_loss: mean negative log-likelihood of the supervised tokens of the evaluation rows, in nats; empty without such rows."""
        if not self.eval_examples:
            return {}
        mine = self.share(self._weighted(self.eval_examples))
        losses = self.backend.score(self.microbatches(mine), self._nll, lambda: [empty_example(["weights"])])
        return {"eval_loss": self.backend.global_sum([sum(losses)])[0]}

    def _weighted(self, examples: Sequence[Example]) -> list[Example]:
        total = sum(int(e.loss_mask.sum()) for e in examples)
        return [
            replace(e, payload={"weights": np.where(e.loss_mask, 1.0 / max(total, 1), 0.0).astype(np.float32)})
            for e in examples
        ]

    def _loss(self, module: Any, examples: list[Example]) -> tuple[Any, dict[str, Any]]:
        batch = self.packed(examples)
        out = module(batch, weights=batch.select("weights"), loss_type=self.config.loss_type)
        return out.loss, {"loss": out.loss.detach()}

    def _nll(self, module: Any, examples: list[Example]) -> float:
        batch = self.packed(examples)
        return float(module(batch, weights=batch.select("weights")).loss)
