"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its relatives, offline and online.

    ref     <- log pi_ref of each answer, summed over its tokens            (offline: once, before the first step)
    repeat:
        pairs  <- the data;   online: sample G completions of each prompt, score, take the best and the worst of each group
        update:   s(y) = log pi(y) - ref(y);   loss = 1/P sum_p -log sigmoid(beta (s(chosen_p) - s(rejected_p)))

or another of the losses in `functional/preference.py`. P counts the pairs of the update over all processes. Online it is OAIF's loop
(Guo et al. 2024, arXiv 2402.04792). Log-probs in the loss are at temperature 1, whatever the sampler's: the objective is about the
policy itself, and does not need pairs that were sampled from it. So rollouts of older weights (`max_staleness`) need no importance
weights; of the online methods DPO bears them best (Noukhovitch et al. 2024, arXiv 2410.18252).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrl.algorithms.base import Reference, Trainer, require
from llmrl.algorithms.rollouts import Rollouts
from llmrl.config.dpo import DPOConfig
from llmrl.data.packing import empty_pair
from llmrl.data.pairs import build_pairs
from llmrl.data.sampler import Sampler
from llmrl.errors import DataError
from llmrl.evaluation.metrics import accuracy_interval
from llmrl.experience.batch import merge_update_metrics, sample_rows, to_example
from llmrl.experience.collect import Experience, Group
from llmrl.functional.preference import Pairs, PreferenceSettings, length_desensitized, preference_loss
from llmrl.models.load import disable_dropout, is_adapted
from llmrl.train.cache import content_hash, read_numbers, write_numbers
from llmrl.types import Example, PackedBatch, ScoredRollout

logger = logging.getLogger("llmrl.dpo")
Forward = Callable[[Any, PackedBatch], Any]  # (wrapped policy, batch) -> TokenScores
_LOSS_SCALARS = ("weights", "ref_logprobs")


class DPOTrainer(Trainer):
    """Trains a policy on pairs of answers, one preferred to the other; with `rewards` or `reward_funcs` it samples and pairs its own.

    `train_dataset` and `eval_dataset` take a list of rows, a `datasets.Dataset` or a list of `Example` (chosen, rejected, chosen, ...;
    online: rows with prompts).

    Example:
        DPOTrainer(DPOConfig(model_name_or_path="m", dataset="pairs.jsonl", output_dir="runs/dpo")).train()
    """

    kind = "dpo"

    def __init__(
        self,
        config: DPOConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_funcs: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.settings = PreferenceSettings(**{f.name: getattr(config, f.name) for f in fields(PreferenceSettings)})
        online = bool(config.rewards) or reward_funcs is not None
        self.rollouts = Rollouts(config, reward_funcs) if online else None
        super().__init__(config, model=model, tokenizer=tokenizer, callbacks=callbacks)
        if self.rollouts is not None:
            steps = self.rollouts.read(self, train_dataset, eval_dataset)
        else:
            steps = self._read(train_dataset, eval_dataset)
        disable_dropout(self.model)
        precompute = not online and not config.sync_ref_model and config.reference_logprobs == "precompute"
        self.reference = None if config.reference_free else self._find_reference(copy=not precompute)
        moving = {"reference": self.reference.module} if config.sync_ref_model else None  # type: ignore[union-attr]
        drawn = self.rollouts or self.sampler
        self.prepare(steps, config.updates_per_step, {"sampler": drawn}, modules=moving)
        if self.rollouts is not None:
            self.rollouts.start(self.module, drop_zero_std=True, max_refills=config.max_refills)  # type: ignore[arg-type]
        if self.reference is not None and precompute:
            self._precompute()

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary; the final model is in `<output_dir>/model`."""
        with self.benchmarks, self.rollouts or nullcontext(), self.run as run:
            for step in run.steps():
                metrics: dict[str, float] = {}
                if self.rollouts is None:
                    parts = self._draw()
                else:
                    experience = self.rollouts.collect(step)
                    parts, metrics = self._pair(experience)
                metrics |= merge_update_metrics([self.update(part) for part in parts])
                if self.config.sync_ref_model and step % self.config.ref_model_sync_steps == 0:
                    self._move_reference()
                if run.due(self.config.eval_steps, step):
                    metrics |= self.evaluate()
                    if self.rollouts is None:
                        metrics |= self.benchmarks.evaluate(step)
                metrics["epoch"] = (self.rollouts or self.sampler).epoch
                run.log(step, metrics, tokens=self._tokens)
                if self.rollouts is not None:
                    self.rollouts.check_gap(metrics)
                    run.log_samples(step, self._samples)
        return run.summary

    def update(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimizer step on pairs: chosen, rejected, chosen, ... Offline every process holds them and takes its share; online
        each gives its own. None where no process has a pair (the schedule of the learning rate goes on).

        The numbers are of the policy before the step; {} if there was none.
        """
        # A pair that a step drew twice, at the seam of two epochs, is two units.
        pairs = [replace(e, unit=i // 2) for i, e in enumerate(examples)]
        mine, nll_weight = self._weighted(pairs if self.rollouts is not None else self.share(pairs))
        if self.reference is not None:
            mine = _with_scalar(mine, "ref_logprobs", self._sequence_logprobs(mine, self.reference))

        def loss(module: Any, batch: list[Example]) -> tuple[Tensor, dict[str, Tensor]]:
            packed = self.packed(batch)
            return self._loss(packed, self._sums(packed, module(packed).logprobs), nll_weight)

        batches = self.microbatches(mine) if nll_weight else []
        stats = self.backend.update(batches, loss, lambda: empty_pair(scalars=_LOSS_SCALARS))
        if not nll_weight:
            return {}
        return {**stats.sums, "grad_norm": stats.grad_norm, "learning_rate": stats.learning_rate}

    def evaluate(self) -> dict[str, float]:
        """The same numbers on the evaluation pairs, and eval_accuracy with its 95% interval; online, the rewards of completions of
        the evaluation prompts. Empty without such data."""
        if self.rollouts is not None:
            return self.rollouts.evaluate()
        examples = self.eval_examples
        if not examples:
            return {}
        logprobs, ref = self._all_logprobs(examples, lambda module, batch: module(batch)), None
        if self.reference is not None:
            ref = self._all_logprobs(examples, self.reference)
        elif self.settings.needs_reference:
            ref = [e.scalars["ref_logprobs"] for e in examples]
        tokens = torch.tensor([int(e.loss_mask.sum()) for e in examples])
        pairs = Pairs.interleaved(_float64(logprobs), tokens, None if ref is None else _float64(ref))
        count = len(examples) // 2
        weights = torch.full((count,), 1 / count, dtype=torch.float64)
        loss, stats = preference_loss(pairs, weights, self.settings, nll_weight=1 / float(pairs.chosen_tokens.sum()))
        accuracy = float(stats["rewards/accuracies"])
        _, low, high = accuracy_interval(
            [accuracy] * count, 1
        )  # of one answer a pair, only the mean and the count matter
        metrics = {"loss": float(loss), **{name: float(value) for name, value in stats.items()}}
        metrics |= {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
        return {f"eval_{name}": value for name, value in metrics.items()}

    # the loss

    def _weighted(self, examples: Sequence[Example]) -> tuple[list[Example], float]:
        """This process's pairs with 1 / pairs of the update as `weights`, and 1 / chosen tokens of the update (0: no pair anywhere)."""
        mine = sum(float(e.loss_mask.sum()) for e in examples[0::2])
        pairs, tokens = self.backend.global_sum([len(examples) / 2, mine])
        if not pairs:
            return [], 0.0
        return _with_scalar(examples, "weights", [1 / pairs] * len(examples)), 1 / tokens

    def _sums(self, batch: PackedBatch, logprobs: Tensor) -> Tensor:
        """[N]: the log-probs [K] of the tokens in the loss, added up over each sequence."""
        sequence = batch.sequence_of_positions()
        if self.config.ld_alpha is not None:
            logprobs = logprobs * length_desensitized(sequence, batch.num_sequences, self.config.ld_alpha)
        return logprobs.new_zeros(batch.num_sequences).index_add(0, sequence, logprobs)

    def _loss(self, batch: PackedBatch, logprobs: Tensor, nll_weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = torch.bincount(batch.sequence_of_positions(), minlength=batch.num_sequences)
        pairs = Pairs.interleaved(logprobs, tokens, batch.scalars.get("ref_logprobs"))
        loss, stats = preference_loss(pairs, batch.scalars["weights"][0::2], self.settings, nll_weight=nll_weight)
        return loss, {"loss": loss.detach(), **stats}

    def _sequence_logprobs(self, mine: Sequence[Example], forward: Forward) -> list[float]:
        """Summed log-probs of this process's sequences, in order, without gradient."""

        def sums(module: Any, batch: list[Example]) -> list[float]:
            packed = self.packed(batch)
            return self._sums(packed, forward(module, packed).logprobs).tolist()

        batches = self.microbatches(mine)
        with self._brought(forward):
            found = self.backend.score(batches, sums, empty_pair)
        by_id = {id(e): value for batch, values in zip(batches, found) for e, value in zip(batch, values)}
        return [by_id[id(e)] for e in mine]

    def _all_logprobs(self, examples: Sequence[Example], forward: Forward) -> list[float]:
        """The same of sequences that every process holds, each process scoring its share; the result is on all of them."""
        place = {id(e): i for i, e in enumerate(examples)}
        mine = self.share(examples)
        local = list(zip((place[id(e)] for e in mine), self._sequence_logprobs(mine, forward)))
        everyone = sorted(item for part in self.backend.gather_json(local) for item in part)
        return [value for _, value in everyone]

    # offline: pairs from the data

    def _read(self, train: Any, evaluation: Any) -> int:
        """Reads the pairs and returns the number of steps."""
        config = self.config
        build = partial(build_pairs, tokenizer=self.tokenizer, config=config, stop_ids=self.stop_ids, for_="dpo")
        self.examples, self.eval_examples = map(_checked, self.read_examples(train, evaluation, build, 2))
        pairs = len(self.examples) // 2
        self.sampler = Sampler(pairs, seed=config.seed, shuffle=config.shuffle)
        return config.max_steps or math.ceil(config.num_train_epochs * pairs / config.batch_size)

    def _draw(self) -> list[list[Example]]:
        """The pairs of each update of a step."""
        rows = self.sampler.take(self.config.batch_size)
        parts = np.array_split(np.asarray(rows), min(self.config.updates_per_step, len(rows)))
        updates = [[self.examples[2 * i + side] for i in part.tolist() for side in (0, 1)] for part in parts]
        self._tokens = sum(len(e) for part in updates for e in part)
        return updates

    # online: pairs from samples

    def _pair(self, experience: Experience) -> tuple[list[list[Example]], dict[str, float]]:
        """This process's pairs of each update of a step, and the numbers of what was sampled.

        Updates get whole blocks of the groups that gave a pair, in their order over all processes.
        """
        assert self.rollouts is not None
        metrics = self.rollouts.metrics(experience)
        found = {g.index: pair for g in experience.groups if (pair := best_and_worst(g)) is not None}
        now = experience.step - 1 if self.config.rollout.max_staleness else None
        examples = {index: _pair_examples(*pair, unit=index, version=now) for index, pair in found.items()}
        everyone = sorted(index for part in self.backend.gather_json(list(found)) for index in part)
        if not everyone and self.backend.is_main:
            logger.warning(
                "step %d: no group has completions with different rewards, so there is no update", experience.step
            )
        blocks = np.array_split(np.asarray(everyone, dtype=np.int64), self.config.updates_per_step)
        parts = [[e for i in block.tolist() for e in examples.get(i, ())] for block in blocks]
        flat = [e for part in parts for e in part]
        self._tokens = int(self.backend.global_sum([float(sum(map(len, flat)))])[0])
        metrics |= {"pairs": float(len(everyone)), **self._sampling_gap(flat)}
        roles = {id(r): sign for pair in found.values() for r, sign in zip(pair, (1.0, -1.0))}
        rollouts = experience.rollouts
        self._samples = sample_rows(rollouts, [roles.get(id(r), 0.0) for r in rollouts])
        return parts, metrics

    def _sampling_gap(self, examples: Sequence[Example]) -> dict[str, float]:
        """|sampled - recomputed| log-probs at the sampling temperature, of a microbatch of pairs a process: a probe is enough."""
        probe = next(iter(self.microbatches(examples)), [])
        temperature = self.config.temperature
        scored = self.score(
            probe, lambda module, batch: module(batch, temperature=temperature), {"logprobs": "logprobs"}
        )
        gaps = [np.abs(e.payload["logprobs"] - e.payload["sampled_logprobs"])[e.loss_mask] for e in scored]
        flat = np.concatenate([np.zeros(0), *gaps])
        fresh = np.concatenate([np.zeros(0), *(gap for e, gap in zip(scored, gaps) if e.scalars.get("fresh"))])
        local = [float(flat.sum()), len(flat), float(flat.max(initial=0.0)), float(fresh.sum()), len(fresh)]
        sums, counts, maxima, fresh_sums, fresh_counts = zip(*self.backend.gather_json(local))
        name = "logp_difference"
        metrics = {
            f"sampling/sampling_{name}/mean": sum(sums) / max(sum(counts), 1),
            f"sampling/sampling_{name}/max": max(maxima),
        }
        if sum(fresh_counts):
            metrics[f"sampling/fresh_{name}/mean"] = sum(fresh_sums) / sum(fresh_counts)
        return metrics

    # the reference

    @staticmethod
    def _brought(forward: Any) -> AbstractContextManager[Any]:
        """Brings a reference that lives in host memory to the device; nothing for other ways to score."""
        return forward if hasattr(forward, "__enter__") else nullcontext()

    def _find_reference(self, *, copy: bool) -> Forward:
        """What scores tokens as the reference. Without `copy` it may be the policy itself, good until its first step."""
        config = self.config
        if not copy and config.ref_model_name_or_path is None and not is_adapted(self.model):
            return lambda module, batch: module(batch)
        reference = Reference(self.model, self.backend, config, self.tokenizer)
        if config.sync_ref_model:
            require(
                reference.module is not None and _shapes(reference.module) == _shapes(self.module),
                "sync_ref_model mixes the weights of policy and reference: they must have the same shapes and no adapter",
            )
            require(
                self.backend.strategy.name != "zero3",
                "sync_ref_model mixes the weights of policy and reference, which under ZeRO-3 lie on the processes in different ways: "
                "launch with fsdp2",
            )
        return reference

    @torch.no_grad()
    def _move_reference(self) -> None:
        """ref <- alpha policy + (1 - alpha) ref: the soft update of TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656); alpha 1 is
        its hard update."""
        assert isinstance(self.reference, Reference) and self.reference.module is not None
        with self.reference:
            for ours, policy in zip(self.reference.module.parameters(), self.module.parameters(), strict=True):
                ours.lerp_(policy.to(ours.device, ours.dtype), self.config.ref_model_mixup_alpha)

    def _precompute(self) -> None:
        """Gives every pair its reference log-probs, read from the disk if they are there, and lets go of the reference.

        Called before a checkpoint is loaded, so that the policy still is what it was at the start.
        """
        config = self.config
        folder = Path(config.reference_cache or Path(config.output_dir, "reference"))
        gathers = self.backend.strategy.shards_parameters  # then all processes take part in the hash
        weights = self._reference_hash() if self.backend.is_main or gathers else ""
        self.examples = self._scored(self.examples, "training", folder, weights)
        if self.eval_examples:
            self.eval_examples = self._scored(self.eval_examples, "evaluation", folder, weights)
        self.reference = None

    def _reference_hash(self) -> str:
        """Of all that the log-probs depend on, but for the pairs."""
        other = getattr(self.reference, "module", None)
        model: Any = self.module.model if other is None else other.model
        settings = {
            "model": {k: v for k, v in model.config.to_dict().items() if k != "transformers_version" and k[0] != "_"},
            "ld_alpha": self.config.ld_alpha,
            "mixed_precision": self.config.mixed_precision,
            "device": self.backend.device.type,
        }
        adapter = (".lora_", ".modules_to_save.") if other is None else ()
        whole = self.backend.strategy.whole
        tensors = ((n, whole(p)) for n, p in model.named_parameters() if not any(mark in n for mark in adapter))
        return content_hash(settings, tensors)

    def _scored(self, examples: list[Example], what: str, folder: Path, weights: str) -> list[Example]:
        """The examples with the scalar `ref_logprobs`."""
        known = None
        if self.backend.is_main:
            arrays = [a for e in examples for a in (e.input_ids, e.loss_mask, np.array([e.prefix, e.unit]))]
            file = folder / f"{content_hash({'reference': weights}, arrays=arrays)}.safetensors"
            known = read_numbers(file, len(examples))
        values = self.backend.broadcast_json(known)
        if values is None:
            values = self._score_reference(examples, what)
            if self.backend.is_main:
                try:
                    write_numbers(file, values)
                except OSError as error:
                    logger.warning("the reference's log-probs are not kept, a next run computes them again: %s", error)
        else:
            self.run.progress.message(f"reference log-probs of the {what} pairs: read from {folder}")
        return _with_scalar(examples, "ref_logprobs", values)

    def _score_reference(self, examples: list[Example], what: str) -> list[float]:
        with self.run.progress.pass_over(len(examples), f"reference log-probs of {what} answers") as advance:

            def forward(module: Any, batch: PackedBatch) -> Any:
                scores = self.reference(module, batch)  # type: ignore[misc]
                advance(batch.num_sequences * self.backend.world_size)
                return scores

            with self._brought(self.reference):
                values = self._all_logprobs(examples, forward)
        bad = [e.id or str(e.unit) for e, value in zip(examples, values) if not math.isfinite(value)]
        if bad:
            raise DataError(
                f"the reference gives {len(bad)} answers a log-prob that is not finite, so that no loss can compare with it; "
                f"the first: {', '.join(bad[:5])}. Are its weights whole?"
            )
        return values


def best_and_worst(group: Group) -> tuple[ScoredRollout, ScoredRollout] | None:
    """The completions with the highest and the lowest reward, the first ones among equals; None where no pair can be made of them:
    equal rewards, or the same tokens twice. Completions without a reward don't take part."""
    scored = sorted((r for r in group.rollouts if r.reward is not None), key=lambda r: r.rollout.index)
    if not scored:
        return None
    best, worst = (pick(scored, key=lambda r: float(r.reward or 0.0)) for pick in (max, min))
    same = best.rollout.completion.ids == worst.rollout.completion.ids
    return None if best.reward == worst.reward or same else (best, worst)


def _pair_examples(
    chosen: ScoredRollout, rejected: ScoredRollout, unit: int, version: int | None = None
) -> tuple[Example, Example]:
    """Both sides with the payload `sampled_logprobs`; the prompt is chosen's. For `version` see `to_examples`."""
    return to_example(chosen, unit, version=version), to_example(rejected, unit, shares=True, version=version)


def _checked(examples: list[Example]) -> list[Example]:
    """The pairs without scalars of their makers. Raises DataError for those that no loss can be made of."""
    bad = [
        e.id or f"pair {i // 2}" for i, e in enumerate(examples) if not e.loss_mask.any() or (i % 2 == 0 and e.prefix)
    ]
    if bad:
        raise DataError(
            f"{len(bad)} examples have no token in the loss, or share the prefix of their rejected answer: give chosen, then rejected; "
            f"the first: {', '.join(bad[:5])}"
        )
    extra = {
        name
        for e in examples[0::2]
        for name, default in (("margin", 0.0), ("soft_label", 1.0))
        if e.scalars.get(name, default) != default
    }
    if extra:
        logger.warning(
            "%s: only reward models are trained on it, DPO is not; for labels that may be wrong there is label_smoothing",
            " and ".join(sorted(extra)),
        )
    return [replace(e, scalars={}) for e in examples]


def _with_scalar(examples: Sequence[Example], name: str, values: Sequence[float]) -> list[Example]:
    return [replace(e, scalars={**e.scalars, name: value}) for e, value in zip(examples, values, strict=True)]


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _shapes(module: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]
