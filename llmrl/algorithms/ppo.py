"""Proximal policy optimisation with a critic (Schulman et al. 2017, arXiv 1707.06347), for language models (arXiv 2203.02155).

    repeat:
        rollouts <- sample completions; score
        r_t      <- reward at the last token, less beta KL_t at every token
        A, R     <- generalised advantage estimates of r and the critic's V; A is whitened
        num_iterations times, for each part of the rollouts:
            loss = sum_t w_t [ -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) ] + vf_coef mean_t max(...)_t
            stop early when the policy has moved by more than target_kl
        beta     <- its controller's next value

The critic is a value head on the policy's trunk, or a model of its own; both are one module with the policy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrl.algorithms.base import Reference, Trainer, require
from llmrl.algorithms.rollouts import Rollouts
from llmrl.config.ppo import PPOConfig
from llmrl.data.packing import empty_example
from llmrl.experience.batch import (
    merge_update_metrics,
    sample_rows,
    scatter,
    split_updates,
    sum_of,
    weigh,
    with_payload,
)
from llmrl.experience.collect import Experience
from llmrl.experience.offpolicy import SampleSizeWatch, fresh_tokens
from llmrl.functional.controllers import make_controller
from llmrl.functional.gae import explained_variance, gae, token_rewards, value_loss, whiten
from llmrl.functional.importance import importance_weights, sampling_stats, sampling_summary
from llmrl.functional.kl import kl_estimate
from llmrl.functional.objective import ObjectiveSettings, policy_objective
from llmrl.models.forward import PolicyModule
from llmrl.models.heads import ScalarHead
from llmrl.models.load import disable_dropout
from llmrl.models.score import ActorCritic, ScoreModule
from llmrl.models.scorer import load_critic, load_critic_skeleton
from llmrl.types import Example, PackedBatch, ScoredRollout

logger = logging.getLogger("llmrl.ppo")


class PPOTrainer(Trainer):
    """Trains a policy and a critic on rewards of the policy's own completions.

    Arguments as in `GRPOTrainer`. Completions without a reward (None) are left out of the update: there is no return to fit.

    Example:
        PPOTrainer(PPOConfig(model_name_or_path="m", dataset="prompts.jsonl", output_dir="runs/ppo"), reward_funcs=[f]).train()
    """

    kind = "ppo"

    def __init__(
        self,
        config: PPOConfig,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_funcs: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.objective = ObjectiveSettings(
            **{f.name: getattr(config, f.name) for f in fields(ObjectiveSettings) if hasattr(config, f.name)}
        )
        self.controller = make_controller(
            config.kl_controller, config.beta, config.kl_target, config.kl_controller_step
        )
        self._critic_rate = 1.0
        if config.critic_learning_rate is not None:
            require(
                config.learning_rate > 0, "critic_learning_rate is given as a multiple of learning_rate, which is 0"
            )
            self._critic_rate = config.critic_learning_rate / config.learning_rate
        self.rollouts = Rollouts(config, reward_funcs)
        self.sample_size = SampleSizeWatch(uncorrected=config.uncorrected)
        super().__init__(config, model=model, tokenizer=tokenizer, callbacks=callbacks)
        steps = self.rollouts.read(self, train_dataset, eval_dataset)
        if config.critic_warmup_steps >= steps and self.backend.is_main:
            logger.warning("all %d steps are critic_warmup_steps: the policy stays as it is", steps)
        self.reference = Reference(self.model, self.backend, config) if config.needs_reference else None
        shared = isinstance(self.module, PolicyModule)
        self.part = "value_head." if shared else "critic."
        self.prepare(
            steps,
            config.updates_per_step * config.num_iterations,
            {"sampler": self.rollouts, "kl_controller": self.controller},
            modules={self.part.rstrip("."): self.module.get_submodule(self.part.rstrip("."))},
            parts=[self.part],
        )
        policy: Any = self.module if shared else self.module.policy
        self.rollouts.start(policy, truncated=config.truncated_completions)

    def wrap(self, model: Any) -> nn.Module:
        """Policy and critic as one module."""
        if self.config.critic == "shared":
            return PolicyModule(model, ScalarHead(model.config.get_text_config().hidden_size))
        config, device = self.config, self.backend.load_device
        critic = self.backend.load(
            lambda: load_critic(config, device, tokenizer=self.tokenizer),
            lambda: load_critic_skeleton(config),
        )
        disable_dropout(critic)
        return ActorCritic(PolicyModule(model), ScoreModule(critic))

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary; the final policy is in `<output_dir>/model`, the critic in checkpoints."""
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
        config = self.config
        metrics = self.rollouts.metrics(experience)
        groups = [replace(g, rollouts=[r for r in g.rollouts if r.reward is not None]) for g in experience.groups]
        experience = replace(experience, groups=groups)
        rollouts = experience.rollouts
        tokens = [float(len(r.rollout.prompt.ids) + len(r.rollout.completion.ids)) for r in rollouts]
        self._tokens = int(self.backend.global_sum([sum(tokens)])[0])
        self._warming_up = experience.step <= config.critic_warmup_steps
        examples = self._score_before(self.rollouts.examples(experience))
        examples, found = self._with_advantages(examples, rollouts)
        metrics |= found
        self._samples = sample_rows(rollouts, [_mean_of(e, "advantages") for e in examples])
        parts = split_updates(experience, examples, config.updates_per_step, self.backend.gather_json)
        prepared = [
            weigh(part, config.aggregation, config.max_completion_length, self.backend.global_sum) for part in parts
        ]
        updates = self._optimize_all(prepared)
        metrics |= merge_update_metrics(updates)
        metrics |= {"beta": self.controller.coef, "updates": float(sum(map(bool, updates)))}
        if config.kl_to == "old":
            metrics |= self._moved(examples)
        if not self._warming_up:  # a policy that stays as it is would send beta to 0
            self.controller.update(metrics.get("kl", math.nan))
        self.rollouts.check_gap(metrics)
        if self.backend.is_main:
            self.sample_size(experience.step, metrics)
        return metrics

    def _score_before(self, examples: list[Example]) -> list[Example]:
        """Adds what must be known before the first update: old log-probs, old values, and the reference's log-probs."""
        temperature = self.config.temperature
        examples = self.score(
            examples,
            lambda module, batch: module(batch, temperature=temperature, values=True),
            {"logprobs": "old_logprobs", "values": "old_values"},
        )
        if (reference := self.reference) is not None:
            with reference:
                examples = self.score(
                    examples,
                    lambda module, batch: reference(module, batch, temperature=temperature),
                    {"logprobs": "ref_logprobs"},
                )
        return examples

    def _with_advantages(
        self, examples: list[Example], rollouts: Sequence[ScoredRollout]
    ) -> tuple[list[Example], dict[str, float]]:
        """Adds `advantages` and `returns`, from the rewards less KL and penalties, and the numbers that say how the critic does."""
        config, total = self.config, self.backend.global_sum
        lengths = [int(e.loss_mask.sum()) for e in examples]
        terminal = torch.tensor([_terminal(r, config.missing_eos_penalty) for r in rollouts], dtype=torch.float64)
        select = partial(_select, examples)
        values, kl = select("old_values"), None
        metrics: dict[str, float] = {}
        if self.reference is not None:
            kl = kl_estimate(select("old_logprobs"), select("ref_logprobs"), config.kl_estimator)
            kls, tokens, sequences = total([float(kl.sum()), float(len(kl)), float(sum(n > 0 for n in lengths))])
            metrics = {"kl": kls / tokens, "kl/sequence": kls / sequences} if tokens else {}
        in_reward = kl if config.kl_place == "reward" else None
        rewards = token_rewards(
            terminal, lengths, kl=in_reward, kl_coef=self.controller.coef if in_reward is not None else 0.0
        )
        advantages, returns = gae(rewards, values, lengths, gamma=config.gamma, lam=config.lam)
        count, *sums = total([float(len(values)), *(float(x.sum()) for x in (values, returns, advantages))])
        means = [s / max(count, 1.0) for s in sums]
        metrics |= dict(zip(("value/mean", "return/mean", "advantage/mean"), means))
        metrics["value/explained_variance"] = explained_variance(values, returns, global_sum=total)
        if config.whiten_advantages:
            advantages = whiten(advantages, global_sum=total)
        columns = {"advantages": scatter(examples, advantages.float()), "returns": scatter(examples, returns.float())}
        out = [with_payload(e, **{name: c[i] for name, c in columns.items()}) for i, e in enumerate(examples)]
        return out, metrics

    def _moved(self, examples: list[Example]) -> dict[str, float]:
        """KL(old || policy) a token after the step's updates, over all processes.

        A controller of this KL has to see where the step went (arXiv 1707.06347, section 4); the first update's own is 0.
        """
        temperature = self.config.temperature
        examples = self.score(
            examples, lambda module, batch: module(batch, temperature=temperature), {"logprobs": "logprobs"}
        )
        kl = kl_estimate(_select(examples, "old_logprobs"), _select(examples, "logprobs"), self.config.kl_estimator)
        total, tokens = self.backend.global_sum([float(kl.sum()), float(len(kl))])
        return {"kl": total / tokens} if tokens else {}

    def _optimize_all(self, parts: Sequence[tuple[list[Example], float]]) -> list[dict[str, float]]:
        """The step's updates, up to the one at which the policy had moved by more than `target_kl`.

        The learning rate's schedule goes on as if all were made: a step's rate must not depend on where earlier ones stopped.
        """
        planned = [part for _ in range(self.config.num_iterations) for part in parts]
        updates: list[dict[str, float]] = []
        for examples, loss_tokens in planned:
            updates.append(self._optimize(examples, loss_tokens))
            moved, limit = updates[-1].get("approx_kl", 0.0), self.config.target_kl
            if limit is not None and moved > limit:
                break
        self.backend.skip_updates(len(planned) - len(updates))
        return updates

    def _optimize(self, examples: list[Example], loss_tokens: float) -> dict[str, float]:
        """One optimizer step on a part of the rollouts; none where no token is left in the loss on any process."""
        names = ["weights", "advantages", "returns", "sampled_logprobs", "old_logprobs", "old_values"]
        names += ["ref_logprobs"] if self.reference is not None else []

        def loss(module: Any, batch: list[Example]) -> tuple[Tensor, dict[str, Tensor]]:
            return self._loss(module, self.packed(batch), 1.0 / loss_tokens)

        scales = {self.part: self._critic_rate, "": 0.0 if self._warming_up else 1.0}
        batches = self.microbatches(examples) if loss_tokens else []
        stats = self.backend.update(batches, loss, lambda: [empty_example(names)], lr_scales=scales)
        if not loss_tokens:
            return {}
        return {**sampling_summary(stats.sums), "grad_norm": stats.grad_norm, "learning_rate": stats.learning_rate}

    def _loss(self, module: Any, batch: PackedBatch, token_share: float) -> tuple[Tensor, dict[str, Tensor]]:
        config, weights = self.config, batch.select("weights")
        out = module(batch, temperature=config.temperature, entropy=True, values=True)
        old, sampled, advantages = (batch.select(n) for n in ("old_logprobs", "sampled_logprobs", "advantages"))
        cap = config.importance_cap if config.importance_correction == "token_truncate" else None
        if cap is not None:
            advantages = advantages * importance_weights(old, sampled, cap=cap)
        in_loss = config.kl_place == "loss"
        policy_loss, stats = policy_objective(
            out.logprobs,
            entropy=out.entropy,
            old_logprobs=old,
            ref_logprobs=batch.select("ref_logprobs") if in_loss and self.reference is not None else None,
            advantages=advantages,
            weights=weights,
            sequence=batch.sequence_of_positions(),
            num_sequences=batch.num_sequences,
            token_share=token_share,
            settings=replace(self.objective, beta=self.controller.coef if in_loss else 0.0),
        )
        stats.pop("kl", None)  # that of the whole step is logged, and steered by
        share = (weights != 0).to(out.values.dtype) * token_share
        vf_loss, vf_stats = value_loss(
            out.values,
            batch.select("old_values"),
            batch.select("returns"),
            share,
            config.cliprange_value,
            token_share=token_share,
        )
        loss = policy_loss + config.vf_coef * vf_loss
        stats |= vf_stats | sampling_stats(old, sampled, weights, token_share, cap=cap, fresh=fresh_tokens(batch))
        return loss, {
            "loss": loss.detach(),
            "policy/loss": policy_loss.detach(),
            "value/loss": vf_loss.detach(),
            **stats,
        }


def _select(examples: Sequence[Example], name: str) -> Tensor:
    """A payload [K] of all tokens in the loss, in float64."""
    parts = [e.payload[name][e.loss_mask] for e in examples]
    return torch.from_numpy(np.concatenate(parts).astype(np.float64)) if parts else torch.zeros(0, dtype=torch.float64)


def _terminal(scored: ScoredRollout, missing_eos_penalty: float | None) -> float:
    cut = scored.rollout.completion.finish_reason == "length"
    assert scored.reward is not None
    return scored.reward - (missing_eos_penalty if cut and missing_eos_penalty else 0.0)


def _mean_of(example: Example, name: str) -> float:
    return sum_of(example, name) / max(int(example.loss_mask.sum()), 1)
