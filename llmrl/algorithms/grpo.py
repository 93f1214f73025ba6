"""Group-relative policy optimisation with a KL to a reference (Shao et al. 2024, arXiv 2402.03300), and its critic-free relatives.

    repeat:
        groups   <- sample G completions of each prompt; score; drop and refill groups without signal
        A        <- (r - mean of the group) / scale
        update:     loss = sum_t w_t [ -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps_high) A) + beta k3(ref, now)_t ]

The weights w_t are the aggregation over the whole update and all processes. Presets (`config/presets.py`) name the axes' values.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from llmrl.algorithms.base import Trainer, require
from llmrl.config.grpo import GRPOConfig
from llmrl.data.build import build_prompts, rows_of
from llmrl.data.packing import empty_example
from llmrl.data.sampler import Sampler
from llmrl.errors import DivergenceError
from llmrl.evaluation.runner import evaluate
from llmrl.experience.batch import (
    compute_advantages,
    merge_reward_metrics,
    merge_update_metrics,
    rollout_metrics,
    sample_rows,
    scatter,
    to_example,
    weigh,
    with_payload,
)
from llmrl.experience.collect import Collector, Experience
from llmrl.functional.importance import importance_weights, sampling_stats
from llmrl.functional.masks import top_entropy_threshold
from llmrl.functional.objective import ObjectiveSettings, policy_objective
from llmrl.models.forward import PolicyModule, TokenScores
from llmrl.models.load import disable_dropout, is_adapted, load_reference
from llmrl.rewards.runner import RewardRunner
from llmrl.rollout.local import LocalEngine
from llmrl.types import Example, PackedBatch, Prompt, Sampling

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
        funcs = (
            [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        )
        self.objective = ObjectiveSettings(**{f.name: getattr(config, f.name) for f in fields(ObjectiveSettings)})
        require(config.rewards or funcs, "GRPO needs a reward: give `rewards` in the recipe or reward_funcs")
        self.rewards = RewardRunner(
            config.rewards, reward_funcs=funcs, on_error=config.on_error, workers=config.reward_workers
        )
        super().__init__(config, model=model, tokenizer=tokenizer, callbacks=callbacks)
        disable_dropout(self.model)
        self.gap_bound = config.max_logprob_gap
        # The model's own type, not the recipe's: a model that was handed in has the one that it has.
        if self.gap_bound is None and config.mixed_precision == "no":
            precise = all(torch.finfo(p.dtype).bits >= 32 for p in self.model.parameters() if p.is_floating_point())
            self.gap_bound = 1e-3 if precise else None
        self.prompts, self.eval_prompts = self._prompts(train_dataset, eval_dataset)
        self.reference = load_reference(config, self.model) if config.beta > 0 else None
        if config.beta > 0 and is_adapted(self.model) and config.lora is None:
            logger.warning(
                "the KL is to the model without its adapter, also to what the adapter had learnt before this run; to stay near "
                "the adapted model, merge it first (llmrl merge) and train a new adapter (lora: {r: 16}) on the result"
            )
        self.reference_module = (
            PolicyModule(self.reference).to(self.backend.device) if self.reference is not None else None
        )
        self.sampler = Sampler(len(self.prompts), seed=config.seed, shuffle=config.shuffle)
        steps = config.max_steps or math.ceil(config.num_train_epochs * len(self.prompts) / config.batch_size)
        self.trainer_state = {"global_step": 0, "max_steps": steps}
        self.prepare(steps, config.updates_per_step * config.num_iterations, {"sampler": self.sampler})
        self.engine = LocalEngine(
            self.module,
            self.tokenizer,
            stop_token_ids=self.stop_ids,
            max_batch_tokens=config.rollout.max_batch_tokens,
            autocast=self.backend.autocast,
        )
        self.collector = Collector(
            self.prompts,
            self.sampler,
            self.engine,
            self.rewards,
            batch_size=config.batch_size,
            num_generations=config.num_generations,
            sampling=Sampling(
                max_tokens=config.max_completion_length, temperature=config.temperature, seed=config.seed
            ),
            drop_zero_std=config.group_filter == "drop_zero_std",
            max_refills=config.max_refills,
            zero_reward_if_truncated=config.truncated_completions == "zero_reward",
            rank=self.backend.rank,
            world_size=self.backend.world_size,
            gather=self.backend.gather_json,
        )

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary; the final model is in `<output_dir>/model`."""
        with self.rewards, self.run as run:
            for step in run.steps():
                self.engine.sync_weights((), version=step - 1)
                self.trainer_state["global_step"] = step
                metrics = self.update(self.collector.collect(step, trainer_state=self.trainer_state))
                if self.eval_prompts and run.due(self.config.eval_steps, step):
                    metrics |= self.evaluate()
                metrics["epoch"] = self.sampler.epoch
                run.log(step, metrics, tokens=self._tokens)
                run.log_samples(step, self._samples)
        return run.summary

    def update(self, experience: Experience) -> dict[str, float]:
        """The optimizer steps on one step's rollouts: `updates_per_step` parts, `num_iterations` times over."""
        config, gather = self.config, self.backend.gather_json
        rollouts = experience.rollouts
        advantages = compute_advantages(experience, config.scale_rewards, gather)
        self._samples = sample_rows(rollouts, advantages)
        metrics = {
            **experience.metrics,
            **rollout_metrics(experience.sampled, self.rewards.names, gather),
            **merge_reward_metrics(gather(self.rewards.pop_metrics())),
        }
        tokens = [
            float(sum(len(r.rollout.prompt.ids) + len(r.rollout.completion.ids) for r in rollouts)),
            float(len(rollouts)),
        ]
        self._tokens, count = (int(n) for n in self.backend.global_sum(tokens))
        if count == 0 and self.backend.is_main:
            logger.warning(
                "step %d: no group of completions has rewards that differ, so there is no update", experience.step
            )
        mask_truncated = config.truncated_completions == "mask"
        examples = [
            to_example(r, a, unit, mask_truncated=mask_truncated)
            for unit, (r, a) in enumerate(zip(rollouts, advantages))
        ]
        # Whole groups, in blocks of their order over all processes: so each update has groups of every process.
        kept = sorted(index for part in gather([g.index for g in experience.groups]) for index in part)
        blocks = np.array_split(kept, config.updates_per_step)
        turn = {int(index): u for u, block in enumerate(blocks) for index in block}
        turns = [turn[g.index] for g in experience.groups for _ in g.rollouts]
        parts = [[e for e, t in zip(examples, turns) if t == u] for u in range(config.updates_per_step)]
        scored = [self._prepare_part(part) for part in parts]
        updates = [self._optimize(*part) for _ in range(config.num_iterations) for part in scored]
        metrics |= merge_update_metrics(updates)
        self._check_gap(metrics)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Mean reward and accuracy on the evaluation prompts, by the same rewards."""
        config = self.config
        sampling = Sampling(config.max_completion_length, temperature=config.eval_temperature, seed=config.seed)
        mine = self.eval_prompts[self.backend.rank :: self.backend.world_size]
        result = evaluate(
            mine,
            self.engine,
            self.rewards,
            n=config.eval_num_generations,
            sampling=sampling,
            gather=self.backend.gather_json,
            trainer_state=self.trainer_state,
        )
        self.rewards.pop_metrics()  # the evaluation's own; its failures are in the result
        return {f"eval_{k}": v for k, v in result.metrics().items()}

    @property
    def _on_policy(self) -> bool:
        """One update a step: the policy that sampled is the policy that is updated, so old log-probs are the current ones."""
        return self.config.updates_per_step * self.config.num_iterations == 1

    def _prepare_part(self, examples: list[Example]) -> tuple[list[Example], float]:
        """Adds the weights, and the log-probs that must be known before the first update: old (unless on policy), reference."""
        config = self.config
        examples, loss_tokens = weigh(
            examples, config.aggregation, config.max_completion_length, self.backend.global_sum
        )
        select = config.top_entropy_quantile < 1
        if select or not self._on_policy:
            examples = self._score(examples, "old_logprobs", entropy=select)
        if select:
            examples = self._keep_top_entropy(examples)
        if config.beta > 0:
            examples = self._score(examples, "ref_logprobs")
        return examples, loss_tokens

    def _score(self, examples: list[Example], name: str, *, entropy: bool = False) -> list[Example]:
        """The examples with the payload `name`, old_logprobs or ref_logprobs, from a pass without gradient; and with `entropy`."""
        reference = name == "ref_logprobs"
        frozen = self.reference_module if reference else None

        def forward(module: Any, batch: list[Example]) -> TokenScores:
            return (frozen or module)(
                self.packed(batch),
                temperature=self.config.temperature,
                entropy=entropy,
                reference=reference and frozen is None,
            )

        batches = self.microbatches(examples)
        out = []
        for batch, scores in zip(batches, self.backend.score(batches, forward, lambda: [empty_example([])])):
            found = {name: scores.logprobs, "entropy": scores.entropy}
            columns = {key: scatter(batch, values) for key, values in found.items() if values is not None}
            out += [with_payload(e, **{key: column[i] for key, column in columns.items()}) for i, e in enumerate(batch)]
        return out

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
        names += ["ref_logprobs"] if self.config.beta > 0 else []

        def loss(module: Any, batch: list[Example]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return self._loss(module, self.packed(batch), 1.0 / loss_tokens)

        batches = self.microbatches(examples) if loss_tokens else []
        stats = self.backend.update(batches, loss, lambda: [empty_example(names)])
        if not loss_tokens:
            return {}
        return {**stats.sums, "grad_norm": stats.grad_norm, "learning_rate": stats.learning_rate}

    def _loss(
        self, module: Any, batch: PackedBatch, token_share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config = self.config
        out = module(batch, temperature=config.temperature, entropy=True)
        logprobs, sampled = out.logprobs, batch.select("sampled_logprobs")
        old = logprobs.detach() if self._on_policy else batch.select("old_logprobs")
        advantages = batch.select("advantages")
        if config.importance_correction == "token_truncate":
            advantages = advantages * importance_weights(old, sampled, cap=config.importance_cap)
        loss, stats = policy_objective(
            logprobs,
            entropy=out.entropy,
            old_logprobs=old,
            ref_logprobs=batch.select("ref_logprobs") if config.beta > 0 else None,
            advantages=advantages,
            weights=batch.select("weights"),
            sequence=batch.sequence_of_positions(),
            num_sequences=batch.num_sequences,
            token_share=token_share,
            settings=self.objective,
        )
        stats |= sampling_stats(old, sampled, batch.select("weights"), token_share)
        return loss, {"loss": loss.detach(), **stats}

    def _check_gap(self, metrics: dict[str, float]) -> None:
        """Stops when sampler and trainer disagree about the same tokens: one of them does not have the weights it should have."""
        gap, bound = metrics.get("sampling/sampling_logp_difference/mean", 0.0), self.gap_bound
        if bound is not None and gap > bound:
            raise DivergenceError(
                f"mean |sampled - recomputed log-prob| is {gap:.3g} nats, over max_logprob_gap {bound:.3g}. "
                "Likely causes: the engine samples with other weights than the trainer's, another temperature, a truncated "
                "support, another chat template or tokenizer, or a model whose decode path differs from its training path"
            )

    def _prompts(self, train: Any, evaluation: Any) -> tuple[list[Prompt], list[Prompt]]:
        config = self.config
        rows, held_out = rows_of(config, train, evaluation)
        require(len(rows), "no prompts: give `dataset` in the recipe or train_dataset")
        if config.max_prompt_length is None:
            positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            if positions is not None:
                require(
                    positions > config.max_completion_length,
                    f"max_completion_length {config.max_completion_length} leaves no room for a prompt in the model's {positions} positions",
                )
                config = config.model_copy(update={"max_prompt_length": positions - config.max_completion_length})
        prompts, self.report = build_prompts(rows, self.tokenizer, config)
        prompts = self._with_usable_golds(prompts)
        return prompts, self._with_usable_golds(build_prompts(held_out, self.tokenizer, config)[0]) if held_out else []

    def _with_usable_golds(self, prompts: list[Prompt]) -> list[Prompt]:
        """Without the prompts whose reference answer a verifier can't use: they would teach, or count, every answer as wrong."""
        bad = self.rewards.check_golds(prompts)
        if not bad:
            return prompts
        ids = {b.prompt_id for b in bad}
        listed = "; ".join(f"{b.prompt_id} ({b.function}: {b.reason})" for b in bad[:5])
        require(len(ids) < len(prompts), f"no prompt has a reference answer that the rewards can use: {listed}")
        logger.warning(
            "%d of %d prompts left out, since a reward can't use their answer: %s", len(ids), len(prompts), listed
        )
        return [p for p in prompts if p.id not in ids]
