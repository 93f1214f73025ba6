"""Reward modelling: a score for each answer, from which of two was preferred, or from whether it was right.

    repeat: pairs <- sampler;  loss = -(1/P) sum_p log sigmoid(r_chosen - r_rejected - margin),  P = pairs of the update over all processes

The score is read at a sequence's last token. What both answers begin with is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrl.algorithms.base import Trainer, require
from llmrl.config.reward_model import RewardConfig
from llmrl.data.packing import empty_example, empty_pair
from llmrl.data.pairs import build_outcomes, build_pairs
from llmrl.data.sampler import Sampler
from llmrl.errors import DivergenceError
from llmrl.evaluation.metrics import accuracy_interval
from llmrl.experience.batch import merge_update_metrics
from llmrl.functional.ranking import agreement, bradley_terry_loss, calibration_error, calibration_sums, outcome_loss
from llmrl.models.load import is_adapted
from llmrl.models.score import ScoreModule
from llmrl.models.scorer import load_scorer, load_scorer_skeleton, set_pad_token
from llmrl.types import Example


class RewardTrainer(Trainer):
    """Trains a sequence classifier with one label on preferences (`loss_type: bradley_terry`) or on outcomes (`outcome`).

    `train_dataset` and `eval_dataset` take a list of rows, a `datasets.Dataset`, or a list of `Example` (of pairs: chosen, rejected,
    chosen, ...; scalars `margin` and `soft_label` of a chosen one are optional, `label` of an outcome is not), instead of the
    recipe's. A model that is handed in gets a padding token that ends no sequence, and so does its tokenizer.

    Example:
        RewardTrainer(RewardConfig(model_name_or_path="m", dataset="pairs.jsonl", output_dir="runs/rm")).train()
    """

    kind = "reward"

    def __init__(
        self,
        config: RewardConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_funcs: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        require(reward_funcs is None, "a reward model learns from rows: reward_funcs belongs to GRPOTrainer")
        self.paired = config.loss_type == "bradley_terry"
        self.width = 2 if self.paired else 1
        if model is not None and tokenizer is not None:
            set_pad_token(model, tokenizer, may_grow=not is_adapted(model))
        super().__init__(config, model=model, tokenizer=tokenizer, callbacks=callbacks)
        build = partial(build_pairs, for_="reward") if self.paired else build_outcomes
        build = partial(build, tokenizer=self.tokenizer, config=config, stop_ids=self.stop_ids)
        data = self.read_examples(train_dataset, eval_dataset, build, self.width)
        self.examples, self.eval_examples = map(self._with_scalars, data)
        rows = len(self.examples) // self.width
        self.sampler = Sampler(rows, seed=config.seed, shuffle=config.shuffle)
        steps = config.max_steps or math.ceil(config.num_train_epochs * rows / config.batch_size)
        self.prepare(steps, config.updates_per_step, {"sampler": self.sampler})

    def load(self) -> tuple[Any, Any]:
        config = self.config
        device = self.backend.load_device
        return self.backend.load(lambda: load_scorer(config, device), lambda: load_scorer_skeleton(config))

    def wrap(self, model: Any) -> nn.Module:
        return ScoreModule(model)

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary; the final model is in `<output_dir>/model`."""
        with self.run as run:
            for step in run.steps():
                rows = self.sampler.take(self.config.batch_size)
                parts = np.array_split(np.asarray(rows), min(self.config.updates_per_step, len(rows)))
                batches = [self._examples_of(part.tolist()) for part in parts]
                metrics = _readable(merge_update_metrics([self._update(batch) for batch in batches]))
                if self.eval_examples and run.due(self.config.eval_steps, step):
                    metrics |= self.evaluate()
                metrics["epoch"] = self.sampler.epoch
                run.log(step, metrics, tokens=sum(len(e) for batch in batches for e in batch))
        return run.summary

    def update(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimizer step on `examples`, which every process holds; each takes its share. Pairs are chosen, rejected, chosen, ...

        The numbers are of the scores before the step: std_reward is their spread over all answers.
        """
        return _readable(self._update(examples))

    def _update(self, examples: Sequence[Example]) -> dict[str, float]:
        weight = self.width / len(examples)  # 1 / pairs, or 1 / answers
        # A pair that a step drew twice, at the seam of two epochs, is two units.
        weighted = [
            replace(e, unit=i // self.width, scalars={**e.scalars, "weights": weight}) for i, e in enumerate(examples)
        ]
        stats = self.backend.update(self.microbatches(self.share(weighted)), self._loss, self._empty)
        return {**stats.sums, "grad_norm": stats.grad_norm, "learning_rate": stats.learning_rate}

    def evaluate(self) -> dict[str, float]:
        """Loss, accuracy with its 95% interval, scores and calibration on the evaluation rows; empty without such rows.

        eval_calibration_error is the mean distance of the stated probability of being right from how often that came true. Of
        pairs, eval_prefers_longer is the share in which the longer answer has the higher score: beside eval_accuracy and the
        report's share of longer chosen answers it shows a model that has learnt to measure length.
        """
        examples = self.eval_examples
        if not examples:
            return {}
        rows = len(examples) // self.width
        weights = torch.full((rows,), 1.0 / rows, dtype=torch.float64)
        scores = self._scores(examples)
        columns = {name: torch.tensor([e.scalars[name] for e in examples], dtype=torch.float64) for name in self._names}
        columns["weights"] = weights.repeat_interleave(self.width)
        loss, stats = self._objective(scores, columns)
        if self.paired:
            logits, labels = scores[0::2] - scores[1::2], columns["soft_label"][0::2]
            lengths = torch.tensor([len(e) + e.prefix for e in examples], dtype=torch.float64)
            longer = torch.sign(lengths[0::2] - lengths[1::2])
            stats["prefers_longer"] = agreement(logits * longer).mean()
        else:
            logits, labels = scores, columns["label"]
        _, low, high = accuracy_interval(agreement(logits, labels).tolist(), 1)
        metrics = _with_spread({"loss": float(loss), **{name: float(value) for name, value in stats.items()}})
        metrics |= {"accuracy_low": low, "accuracy_high": high}
        metrics["calibration_error"] = calibration_error(calibration_sums(logits, weights, labels=labels))
        return {f"eval_{name}": value for name, value in metrics.items()}

    @property
    def _names(self) -> tuple[str, ...]:
        """The scalars of an example."""
        return ("margin", "soft_label") if self.paired else ("label",)

    def _with_scalars(self, examples: list[Example]) -> list[Example]:
        """`Example`s that were handed in need no margin and no soft label."""
        if not self.paired:
            require(
                all("label" in e.scalars for e in examples),
                "each Example of an outcome needs the scalar `label`, 0 to 1",
            )
            return examples
        return [replace(e, scalars={"margin": 0.0, "soft_label": 1.0, **e.scalars}) for e in examples]

    def _examples_of(self, rows: Sequence[int]) -> list[Example]:
        return [self.examples[self.width * i + side] for i in rows for side in range(self.width)]

    def _empty(self) -> list[Example]:
        names = (*self._names, "weights")
        return empty_pair(scalars=names) if self.paired else [empty_example(scalars=names)]

    def _loss(self, module: Any, examples: list[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.packed(examples)
        scores = module(batch)
        loss, stats = self._objective(scores, batch.scalars)
        ends = {"reward/min": scores.detach().min(), "reward/max": scores.detach().max()}
        return loss, {"loss": loss.detach(), **stats, **ends}

    def _objective(self, scores: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the statistics of scores [N] with their scalars [N]."""
        if not self.paired:
            return outcome_loss(scores, columns["label"], columns["weights"])
        return bradley_terry_loss(
            scores[0::2],
            scores[1::2],
            columns["weights"][0::2],
            margin=columns["margin"][0::2],
            soft_label=columns["soft_label"][0::2],
            center_rewards_coefficient=self.config.center_rewards_coefficient,
        )

    def _scores(self, examples: Sequence[Example]) -> Tensor:
        """[N] float64 in the order of `examples`, on every process, without gradient."""
        place = {id(e): i for i, e in enumerate(examples)}
        batches = self.microbatches(self.share(examples))
        found = self.backend.score(batches, lambda module, batch: module(self.packed(batch)).tolist(), self._empty)
        mine = [(place[id(e)], score) for batch, scores in zip(batches, found) for e, score in zip(batch, scores)]
        everyone = sorted(item for part in self.backend.gather_json(mine) for item in part)
        scores = torch.tensor([score for _, score in everyone], dtype=torch.float64)
        if len(bad := (~scores.isfinite()).nonzero()):
            raise DivergenceError(
                f"{len(bad)} of {len(scores)} scores are not finite, first that of row {examples[int(bad[0])].id or int(bad[0])}. The "
                "weights are not, or fp16 overflows (`mixed_precision: bf16` does not)"
            )
        return scores


def _readable(stats: Mapping[str, float]) -> dict[str, float]:
    """What is logged, from the statistics of one update or of several merged ones."""
    metrics = _with_spread(stats)
    return metrics | {f"{end}_reward": metrics.pop(f"reward/{end}") for end in ("min", "max")}


def _with_spread(stats: Mapping[str, float]) -> dict[str, float]:
    """The statistics with std_reward instead of the mean square."""
    out = dict(stats)
    out["std_reward"] = math.sqrt(max(out.pop("mean_square_reward") - out["mean_reward"] ** 2, 0.0))
    return out
