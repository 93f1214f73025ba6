"""Group-relative policy optimisation with a KL to a reference (Shao et al. 2024, arXiv 2402.03300), and its critic-free relatives.

    repeat:
        groups   <- sample G completions of each prompt; score; drop and refill groups without signal
        A        <- (r - baseline) / scale            (baseline: the group's mean, in GRPO)
        update:     loss = sum_t w_t [ -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps_high) A) + beta k3(ref, now)_t ]

The weights w_t are the aggregation over the whole update and all processes. Presets (`config/presets.py`) name the axes' values.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from llmrl.algorithms.base import Reference, Trainer
from llmrl.algorithms.rollouts import Rollouts
from llmrl.config.grpo import GRPOConfig
from llmrl.data.packing import empty_example
from llmrl.experience.batch import (
    compute_advantages,
    merge_update_metrics,
    sample_rows,
    split_updates,
    sum_of,
    weigh,
    with_advantage,
    with_payload,
)
from llmrl.experience.collect import Experience
from llmrl.experience.offpolicy import SampleSizeWatch, fresh_tokens
from llmrl.functional.advantages import RunningMean
from llmrl.functional.importance import importance_weights, sampling_stats, sampling_summary
from llmrl.functional.masks import top_entropy_threshold
from llmrl.functional.objective import ObjectiveSettings, policy_objective
from llmrl.models.forward import PolicyModule
from llmrl.types import Example, PackedBatch

logger = logging.getLogger("llmrl.grpo")


class GRPOTrainer(Trainer):
    """Trains a policy on rewards of its own completions.

    `reward_funcs` takes TRL-style callables beside (or instead of) the recipe's `rewards`; `train_dataset` and `eval_dataset`
    take a list of rows or a `datasets.Dataset`.

    Example:
        GRPOTrainer(GRPOConfig(model_name_or_path="m", dataset="prompts.jsonl", output_dir="runs/grpo"), reward_funcs=[f]).train()
    """

    kind = "grpo"

    def __init__(
        self,
        config: GRPOConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_funcs: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        settings = {f.name: getattr(config, f.name) for f in fields(ObjectiveSettings) if hasattr(config, f.name)}
        if config.kl_place == "reward":
            settings["beta"] = 0.0
        self.objective = ObjectiveSettings(**settings)
        self.rollouts = Rollouts(config, reward_funcs)
        self.sample_size = SampleSizeWatch(uncorrected=config.uncorrected)
        super().__init__(config, model=model, tokenizer=tokenizer, callbacks=callbacks)
        steps = self.rollouts.read(self, train_dataset, eval_dataset)
        self.reference = Reference(self.model, self.backend, config) if config.beta > 0 else None
        self.running_mean = RunningMean(config.baseline_momentum)
        stateful: dict[str, Any] = {"sampler": self.rollouts}
        if config.baseline == "running_mean":
            stateful["running_mean"] = self.running_mean
        self.prepare(steps, config.updates_per_step * config.num_iterations, stateful)
        assert isinstance(self.module, PolicyModule)
        self.rollouts.start(
            self.module,
            drop_zero_std=config.group_filter == "drop_zero_std",
            max_refills=config.max_refills,
            truncated=config.truncated_completions,
        )

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary; the final model is in `<output_dir>/model`."""
        with self.benchmarks, self.rollouts, self.run as run:
            for step in run.steps():
                metrics = self.update(self.rollouts.collect(step))
                if run.due(self.config.eval_steps, step):
                    metrics |= self.rollouts.evaluate()
                metrics["epoch"] = self.rollouts.epoch
                run.log(step, metrics, tokens=self._tokens)
                run.log_samples(step, self._samples)
        return run.summary

    def update(self, experience: Experience) -> dict[str, float]:
        """The optimizer steps on one step's rollouts: `updates_per_step` parts, `num_iterations` times over."""
        config, rollouts = self.config, experience.rollouts
        metrics = self.rollouts.metrics(experience)
        self._tokens, count = self._count(rollouts)
        if count == 0 and self.backend.is_main:
            logger.warning(
                "step %d: no group of completions has rewards that differ, so there is no update", experience.step
            )
        examples = self._score_before(self.rollouts.examples(experience))
        penalties = [0.0] * len(examples)
        if config.beta > 0 and config.kl_place == "reward":
            kls = [sum_of(e, "old_logprobs") - sum_of(e, "ref_logprobs") for e in examples]
            penalties = [config.beta * kl for kl in kls]
            tokens = [float(e.loss_mask.sum()) for e in examples]
            total_kl, total = self.backend.global_sum([sum(kls), sum(tokens)])
            metrics["kl"] = total_kl / max(total, 1.0)
        advantages = compute_advantages(
            experience,
            penalties,
            baseline=config.baseline,
            scale=config.scale_rewards,
            gather=self.backend.gather_json,
            running_mean=self.running_mean,
        )
        self._samples = sample_rows(rollouts, advantages)
        examples = [with_advantage(e, a) for e, a in zip(examples, advantages)]
        parts = split_updates(experience, examples, config.updates_per_step, self.backend.gather_json)
        prepared = [self._prepare_part(part) for part in parts]
        updates = [self._optimize(*part) for _ in range(config.num_iterations) for part in prepared]
        metrics |= merge_update_metrics(updates)
        self.rollouts.check_gap(metrics)
        if self.backend.is_main:
            self.sample_size(experience.step, metrics)
        return metrics

    @property
    def _on_policy(self) -> bool:
        """One update a step: the policy before it is the one that is updated, so old log-probs are the current ones.

        Of stale rollouts too: the ratio is to the policy before the step's updates, whoever sampled; `functional/importance.py`.
        """
        return self.config.updates_per_step * self.config.num_iterations == 1

    def _count(self, rollouts: Sequence[Any]) -> tuple[int, int]:
        """Tokens and rollouts of a step, over all processes."""
        tokens = sum(len(r.rollout.prompt.ids) + len(r.rollout.completion.ids) for r in rollouts)
        total, count = self.backend.global_sum([float(tokens), float(len(rollouts))])
        return int(total), int(count)

    def _score_before(self, examples: list[Example]) -> list[Example]:
        """Adds what must be known before the first update: log-probs of old policy (unless on policy) and reference, entropies."""
        config, temperature = self.config, self.config.temperature
        select = config.top_entropy_quantile < 1
        kl_in_reward = config.beta > 0 and config.kl_place == "reward"
        if select or kl_in_reward or not self._on_policy:
            names = {"logprobs": "old_logprobs"} | ({"entropy": "entropy"} if select else {})
            examples = self.score(
                examples, lambda module, batch: module(batch, temperature=temperature, entropy=select), names
            )
        if (reference := self.reference) is not None:
            with reference:
                examples = self.score(
                    examples,
                    lambda module, batch: reference(module, batch, temperature=temperature),
                    {"logprobs": "ref_logprobs"},
                )
        return examples

    def _prepare_part(self, examples: list[Example]) -> tuple[list[Example], float]:
        """The examples of one update with their weights, and the number of tokens in its loss, over all processes."""
        config = self.config
        examples, loss_tokens = weigh(
            examples, config.aggregation, config.max_completion_length, self.backend.global_sum
        )
        if config.top_entropy_quantile < 1:
            examples = self._keep_top_entropy(examples)
        return examples, loss_tokens

    def _keep_top_entropy(self, examples: list[Example]) -> list[Example]:
        """Only the tokens of highest entropy get a policy gradient (Wang et al. 2025, arXiv 2506.01939).

        The others' advantages become 0: they stay in every denominator, in the KL (as in TRL) and in the ratio of a sequence.
        """
        values = [torch.from_numpy(e.payload["entropy"][e.loss_mask]) for e in examples]
        flat = torch.cat(values) if values else torch.zeros(0)
        threshold = top_entropy_threshold(flat, self.config.top_entropy_quantile, self.backend.global_sum)
        return [
            with_payload(
                e, advantages=np.where(e.payload["entropy"] >= threshold, e.payload["advantages"], np.float32(0))
            )
            for e in examples
        ]

    def _optimize(self, examples: list[Example], loss_tokens: float) -> dict[str, float]:
        """One optimizer step on a part of the rollouts; none where no token is left in the loss on any process.

        The learning rate's schedule goes on in any case: a step's rate must not depend on what was dropped before it.
        """
        names = ["weights", "advantages", "sampled_logprobs"]
        names += [] if self._on_policy else ["old_logprobs"]
        names += ["ref_logprobs"] if self.objective.beta > 0 else []

        def loss(module: Any, batch: list[Example]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return self._loss(module, self.packed(batch), 1.0 / loss_tokens)

        batches = self.microbatches(examples) if loss_tokens else []
        stats = self.backend.update(batches, loss, lambda: [empty_example(names)])
        if not loss_tokens:
            return {}
        return {**sampling_summary(stats.sums), "grad_norm": stats.grad_norm, "learning_rate": stats.learning_rate}

    def _loss(
        self, module: Any, batch: PackedBatch, token_share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config = self.config
        out = module(batch, temperature=config.temperature, entropy=True)
        logprobs, sampled = out.logprobs, batch.select("sampled_logprobs")
        old = logprobs.detach() if self._on_policy else batch.select("old_logprobs")
        advantages = batch.select("advantages")
        cap = config.importance_cap if config.importance_correction == "token_truncate" else None
        if cap is not None:
            advantages = advantages * importance_weights(old, sampled, cap=cap)
        loss, stats = policy_objective(
            logprobs,
            entropy=out.entropy,
            old_logprobs=old,
            ref_logprobs=batch.select("ref_logprobs") if self.objective.beta > 0 else None,
            advantages=advantages,
            weights=batch.select("weights"),
            sequence=batch.sequence_of_positions(),
            num_sequences=batch.num_sequences,
            token_share=token_share,
            settings=self.objective,
        )
        fresh = fresh_tokens(batch)
        stats |= sampling_stats(old, sampled, batch.select("weights"), token_share, cap=cap, fresh=fresh)
        return loss, {"loss": loss.detach(), **stats}
