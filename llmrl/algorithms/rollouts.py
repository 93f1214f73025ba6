"""What the trainers that sample their own data share: prompts, rewards, engine, collection, evaluation, the log-prob gap."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from llmrl.algorithms.base import Trainer, require
from llmrl.data.build import build_prompts, rows_of
from llmrl.data.sampler import Sampler
from llmrl.errors import DivergenceError
from llmrl.evaluation.runner import evaluate
from llmrl.experience.batch import merge_reward_metrics, rollout_metrics, to_examples
from llmrl.experience.collect import Collector, Experience
from llmrl.models.forward import PolicyModule
from llmrl.models.load import disable_dropout
from llmrl.rewards.runner import RewardRunner
from llmrl.rollout.local import LocalEngine
from llmrl.train.launch import local_device
from llmrl.types import Example, Prompt, Sampling

logger = logging.getLogger("llmrl")


class Rollouts:
    """Made in three moves, in a trainer's set-up: `Rollouts(...)` loads the rewards, before any model, so that a wrong one fails at
    once; `read` takes the prompts; `start` makes the engine, once the trainer is prepared.

    `reward_funcs` takes TRL-style callables beside (or instead of) the recipe's `rewards`.
    """

    def __init__(self, config: Any, reward_funcs: Any) -> None:
        listed = isinstance(reward_funcs, list | tuple)
        funcs = [] if reward_funcs is None else list(reward_funcs) if listed else [reward_funcs]
        require(config.rewards or funcs, f"{config.kind} needs a reward: give `rewards` in the recipe or reward_funcs")
        self.config = config
        self.rewards = RewardRunner(
            config.rewards,
            reward_funcs=funcs,
            on_error=config.on_error,
            workers=config.reward_workers,
            device=local_device(),
        )

    def read(self, trainer: Trainer, train: Any, evaluation: Any) -> int:
        """Reads prompts and evaluation prompts and returns the number of steps; turns dropout off, as the KL and the ratio need."""
        self.trainer, config = trainer, self.config
        disable_dropout(trainer.model)
        self.gap_bound = config.max_logprob_gap
        # The model's own type, not the recipe's: a model that was handed in has the one that it has.
        if self.gap_bound is None and config.mixed_precision == "no":
            floats = [p for p in trainer.model.parameters() if p.is_floating_point()]
            self.gap_bound = 1e-3 if all(torch.finfo(p.dtype).bits >= 32 for p in floats) else None
        rows, held_out = rows_of(config, train, evaluation)
        require(len(rows), "no prompts: give `dataset` in the recipe or train_dataset")
        if config.max_prompt_length is None:
            positions = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
            if positions is not None:
                require(
                    positions > config.max_completion_length,
                    f"max_completion_length {config.max_completion_length} leaves no room for a prompt in the model's {positions} positions",
                )
                config = config.model_copy(update={"max_prompt_length": positions - config.max_completion_length})
        prompts, trainer.report = build_prompts(rows, trainer.tokenizer, config)
        self.prompts = self._with_usable_golds(prompts)
        self.eval_prompts: list[Prompt] = []
        if held_out:
            self.eval_prompts = self._with_usable_golds(build_prompts(held_out, trainer.tokenizer, config)[0])
        self.sampler = Sampler(len(self.prompts), seed=config.seed, shuffle=config.shuffle)
        steps = config.max_steps or math.ceil(config.num_train_epochs * len(self.prompts) / config.batch_size)
        self.trainer_state = {"global_step": 0, "max_steps": steps}
        return steps

    def start(
        self, policy: PolicyModule, *, drop_zero_std: bool = False, max_refills: int = 0, truncated: str = "keep"
    ) -> None:
        """Makes the engine that samples with the weights of `policy`, and the collector; `truncated` says what becomes of completions
        that the token limit cut (`truncated_completions` of a recipe)."""
        config, trainer = self.config, self.trainer
        self.policy, self.truncated = policy, truncated
        self.engine = LocalEngine(
            policy,
            trainer.tokenizer,
            stop_token_ids=trainer.stop_ids,
            max_batch_tokens=config.rollout.max_batch_tokens,
            autocast=trainer.backend.autocast,
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
            drop_zero_std=drop_zero_std,
            max_refills=max_refills,
            zero_reward_if_truncated=truncated == "zero_reward",
            rank=trainer.backend.rank,
            world_size=trainer.backend.world_size,
            gather=trainer.backend.gather_json,
        )

    def collect(self, step: int) -> Experience:
        """The scored rollouts of a step, sampled with the weights of now."""
        self.engine.sync_weights(None, version=step - 1)
        self.trainer_state["global_step"] = step
        return self.collector.collect(step, trainer_state=self.trainer_state)

    def examples(self, experience: Experience) -> list[Example]:
        """One example a rollout; completions of a group share their prompt in microbatches, where the model can be packed."""
        return to_examples(
            experience,
            unit_tokens=self.config.tokens_per_microbatch if self.policy.packing == "packed" else 0,
            mask_truncated=self.truncated == "mask",
        )

    def metrics(self, experience: Experience) -> dict[str, float]:
        """The numbers of what was sampled, over all processes."""
        gather = self.trainer.backend.gather_json
        metrics = rollout_metrics(experience.sampled, self.rewards.names, gather)
        masked = self.truncated == "mask" and metrics.get("completions/clipped_ratio") == 1.0
        if self.trainer.backend.is_main and ("reward" not in metrics or masked):
            what = (
                "every completion was cut, and truncated_completions is mask"
                if masked
                else "no completion got a reward"
            )
            logger.warning("step %d: %s, so there is nothing to learn from", experience.step, what)
        return {**experience.metrics, **metrics, **merge_reward_metrics(gather(self.rewards.pop_metrics()))}

    def evaluate(self) -> dict[str, float]:
        """Mean reward and accuracy on the evaluation prompts, by the same rewards; empty without such prompts."""
        if not self.eval_prompts:
            return {}
        config, backend = self.config, self.trainer.backend
        result = evaluate(
            self.eval_prompts[backend.rank :: backend.world_size],
            self.engine,
            self.rewards,
            n=config.eval_num_generations,
            sampling=Sampling(config.max_completion_length, temperature=config.eval_temperature, seed=config.seed),
            gather=backend.gather_json,
            trainer_state=self.trainer_state,
        )
        self.rewards.pop_metrics()  # the evaluation's own; its failures are in the result
        return {f"eval_{k}": v for k, v in result.metrics().items()}

    def check_gap(self, metrics: dict[str, float]) -> None:
        """Stops when sampler and trainer disagree about the same tokens: one of them does not have the weights it should have."""
        gap, bound = metrics.get("sampling/sampling_logp_difference/mean", 0.0), self.gap_bound
        if bound is not None and gap > bound:
            raise DivergenceError(
                f"mean |sampled - recomputed log-prob| is {gap:.3g} nats, over max_logprob_gap {bound:.3g}. "
                "Likely causes: the engine samples with other weights than the trainer's, another temperature, a truncated "
                "support, another chat template or tokenizer, or a model whose decode path differs from its training path"
            )

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
