"""What the trainers that sample their own data share: prompts, rewards, engine, collection, evaluation, the log-prob gap."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from llmrl.algorithms.base import Trainer, require
from llmrl.algorithms.engines import GAP_CAUSES, Canary, engine_metrics, gap_bound, make_engine
from llmrl.data.build import build_prompts, rows_of
from llmrl.data.sampler import Sampler
from llmrl.errors import DivergenceError, LLMRLError, LostProcessError
from llmrl.evaluation.judges import LocalJudges
from llmrl.evaluation.runner import evaluate
from llmrl.experience.ahead import Ahead
from llmrl.experience.batch import merge_reward_metrics, rollout_metrics, to_examples
from llmrl.experience.collect import Collector, Experience
from llmrl.experience.offpolicy import staleness_metrics
from llmrl.models.forward import PolicyModule
from llmrl.models.load import disable_dropout
from llmrl.rewards.runner import RewardRunner
from llmrl.train.launch import local_device
from llmrl.types import Example, Prompt, Sampling

logger = logging.getLogger("llmrl")


class Rollouts:
    """Made in three moves, in a trainer's set-up: `Rollouts(...)` loads the rewards, before any model, so that a wrong one fails at
    once; `read` takes the prompts; `start` makes the engine, once the trainer is prepared. As a context it ends engine and rewards.

    `reward_funcs` takes TRL-style callables beside (or instead of) the recipe's `rewards`. Checkpoints keep which prompts were
    trained on (`state_dict`): rollouts that were made ahead of their step, and not used, are made again after a resume.
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
            allow_code_execution=config.allow_code_execution,
            combine=config.combine,
            gate_threshold=config.gate_threshold,
            make_judge=LocalJudges(),
        )

    def read(self, trainer: Trainer, train: Any, evaluation: Any) -> int:
        """Reads prompts and evaluation prompts and returns the number of steps; turns dropout off, as the KL and the ratio need."""
        self.trainer, config = trainer, self.config
        disable_dropout(trainer.model)
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
        self._cursor = self.sampler.state_dict()
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
        longest = max(len(p.ids) for p in [*self.prompts, *self.eval_prompts]) + config.max_completion_length
        longest = max(longest, trainer.benchmarks.longest)
        self.engine = trainer.backend.together(lambda: make_engine(trainer, policy, longest))
        self.weights = trainer.backend.policy_weights()
        self.gap_bound = gap_bound(config, trainer.model, self.engine.dtype)
        self.canary = Canary(trainer, self.engine, longest, self.gap_bound)
        self._synced: int | None = None
        self._ahead: Ahead | None = None
        self._engine_metrics: dict[str, float] = {}
        # A thread that makes rollouts ahead must not share a process group with the trainer's own collectives.
        self._channel = trainer.backend.second_channel() if config.rollout.max_staleness else trainer.backend
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
            gather=self._channel.gather_json,
        )

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine and the reward workers; may be called twice."""
        if self._ahead is not None:
            self._ahead.closing.set()
        self.engine.close()  # ends the requests that the thread waits for
        if self._ahead is not None:
            self._ahead.close()
        self.rewards.close()

    @property
    def epoch(self) -> float:
        """Passes over the prompts that were trained on."""
        return self._cursor["epoch"] + self._cursor["position"] / self._cursor["n"]

    def state_dict(self) -> dict[str, Any]:
        return dict(self._cursor)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state)
        self._cursor = self.sampler.state_dict()

    def collect(self, step: int) -> Experience:
        """The scored rollouts of a step, sampled with the weights of now, or of at most `max_staleness` steps ago.

        What an engine or a reward function raises passes, on every process, after a checkpoint of the steps before was saved: prompts
        that were drawn for this step are drawn again when the run continues.
        """
        self.trainer_state["global_step"] = step
        try:
            self._sync(step - 1)
            began = time.monotonic()
            if self.config.rollout.max_staleness:
                experience, self._cursor = self._take(step)
            else:
                experience = self._make(step)
                self._cursor = self.sampler.state_dict()
            self._engine_metrics["rollout/seconds"] = time.monotonic() - began
            self.trainer.backend.together(self.engine.verify)
            self.engine.rest()
        except LostProcessError:
            raise  # nothing can be saved without the others
        except LLMRLError:
            self._rescue(step)
            raise
        return experience

    def _make(self, step: int) -> Experience:
        with self.trainer.backend.standing.during(f"sampling for step {step}"):
            return self.collector.collect(step, trainer_state={**self.trainer_state, "global_step": step})

    def _sync(self, version: int) -> None:
        """Gives the engine the weights of now, and proves that it has them."""
        if self._synced == version:
            return
        began = time.monotonic()
        with self.trainer.backend.standing.during("giving the engine the weights"):
            report = self.trainer.backend.together(lambda: self.engine.sync_weights(self.weights, version))
        self._synced = version
        if report.count:
            moved = {"sync/tensors": float(report.count), "sync/bytes": float(report.bytes)}
            self._engine_metrics |= {**moved, **self.canary.check(version), "sync/seconds": time.monotonic() - began}

    def _take(self, step: int) -> tuple[Experience, dict[str, Any]]:
        if self._ahead is None:
            self._ahead = Ahead(
                self._make,
                max_staleness=self.config.rollout.max_staleness,
                first_step=step,
                last_step=self.trainer.run.total_steps,
                cursor=self.sampler.state_dict,
                gather=self._channel.gather_json,
            )
        self._ahead.allow(step - 1)
        return self._ahead.take(step)

    def _rescue(self, step: int) -> None:
        """Ends sampling and saves what is trained so far; the weights are those after the step before."""
        self.close()
        if step > 1:
            try:
                self.trainer.run.save()
                logger.error(
                    "step %d failed; a checkpoint of step %d is saved, the same command continues from it",
                    step,
                    step - 1,
                )
            except LLMRLError as second:
                logger.error("step %d failed, and so did saving step %d: %s", step, step - 1, second)

    def examples(self, experience: Experience) -> list[Example]:
        """One example a rollout; completions of a group share their prompt in microbatches, where the model can be packed."""
        return to_examples(
            experience,
            unit_tokens=self.config.tokens_per_microbatch if self.policy.packing == "packed" else 0,
            mask_truncated=self.truncated == "mask",
            version=experience.step - 1 if self.config.rollout.max_staleness else None,
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
        if self.engine.dtype is not None:
            metrics |= staleness_metrics(experience.sampled, experience.step - 1, gather)
        own, self._engine_metrics = {**self._engine_metrics, **engine_metrics(self.engine)}, {}
        return {**experience.metrics, **metrics, **own, **merge_reward_metrics(gather(experience.reward_metrics))}

    def evaluate(self) -> dict[str, float]:
        """Mean reward and accuracy on the evaluation prompts, by the same rewards, and the benchmarks' numbers; empty without either."""
        if not self.eval_prompts and not self.trainer.benchmarks:
            return {}
        step = self.trainer_state["global_step"]
        self._sync(step)
        with self.trainer.backend.standing.during("evaluating"):
            return self._evaluate_prompts() | self.trainer.benchmarks.evaluate(step, self.engine)

    def _evaluate_prompts(self) -> dict[str, float]:
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
        return {f"eval_{k}": v for k, v in result.metrics().items()}

    def check_gap(self, metrics: dict[str, float]) -> None:
        """Stops when sampler and trainer disagree about the same tokens: one of them does not have the weights it should have.

        Of rollouts that were made ahead, only tokens that the newest weights sampled count.
        """
        name = "fresh_logp_difference" if self.config.rollout.max_staleness else "sampling_logp_difference"
        gap = metrics.get(f"sampling/{name}/mean", 0.0)
        if not gap <= self.gap_bound:
            raise DivergenceError(
                f"mean |sampled - recomputed log-prob| is {gap:.3g} nats, over max_logprob_gap {self.gap_bound:.3g}. {GAP_CAUSES}"
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
