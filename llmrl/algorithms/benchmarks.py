"""Benchmarks while a model trains: read, asked, judged and written down as `llmrl eval` does, sampled from the weights of now."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.config.benchmark import BenchmarkRun
from llmrl.config.evaluation import EvalConfig
from llmrl.data.sampler import permutation
from llmrl.errors import ConfigError
from llmrl.evaluation.manifest import package_version
from llmrl.evaluation.result import EvalResult
from llmrl.evaluation.run import Task, benchmark_task, check_lengths, manifest_of, open_scorers, read_prompts
from llmrl.evaluation.runner import evaluate
from llmrl.rollout.local import LocalEngine
from llmrl.types import RolloutEngine, Sampling

if TYPE_CHECKING:
    from llmrl.algorithms.base import Trainer

logger = logging.getLogger("llmrl")
_STREAM = 2**34
"""Of the random numbers that choose `max_problems`."""


class Benchmarks:
    """The recipe's `benchmarks`, read and tokenised when a trainer is made, so that what is wrong with them ends no long run."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config = trainer, trainer.config
        self._stack = ExitStack()
        self.longest = 0  # tokens of the longest prompt with its completion
        read = [self._read(entry) for entry in getattr(self.config, "benchmarks", ())]
        self.tasks = [task for task, _ in read]
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"benchmarks: one of {', '.join(names)} stands twice; their numbers would hide each other"
            )
        if not self.tasks:
            return
        open_scorers(self.tasks, self._stack, allow_code_execution=self.config.allow_code_execution)
        limit = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
        for task, settings in read:
            read_prompts(settings, task, trainer.tokenizer)
            self.longest = max(self.longest, check_lengths(settings, task, trainer.tokenizer, limit))
            task.manifest = manifest_of(settings, task, trainer.tokenizer, self._described())
            for note in task.notes:
                logger.warning("benchmark %s: %s", task.name, note)

    def __bool__(self) -> bool:
        return bool(self.tasks)

    def evaluate(self, step: int, engine: RolloutEngine | None = None) -> dict[str, float]:
        """Every benchmark's numbers as eval_<benchmark>/accuracy, ...; the results go to `<output_dir>/evaluations/step_<step>/`.

        `engine` samples with the weights of now; by default the model that is trained does. All processes call it, each samples its
        share of the problems.
        """
        trainer, metrics = self.trainer, dict[str, float]()
        rank, world = trainer.backend.rank, trainer.backend.world_size
        folder = Path(self.config.output_dir) / "evaluations" / f"step_{step:08d}"
        own = self._own_engine() if engine is None and self.tasks else None
        if own is not None:
            engine = own
            own.sync_weights(trainer.backend.policy_weights(), step)
        for task in self.tasks:
            spec = task.spec
            assert engine is not None and task.scorer is not None and task.template is not None
            result = evaluate(
                task.prompts[rank::world],
                engine,
                task.scorer,
                n=spec.n,
                sampling=Sampling(
                    spec.max_completion_length,
                    temperature=spec.temperature,
                    top_p=spec.top_p,
                    seed=task.manifest["seed"],
                ),
                threshold=spec.threshold,
                gather=trainer.backend.gather_json,
                trainer_state={"global_step": step, "max_steps": trainer.run.total_steps},
                name=task.name,
                judged_by=spec.scorer,
                breakdown=spec.breakdown,
                also=spec.also,
                cut=task.template.cut,
                manifest={
                    **task.manifest,
                    "model": {"name": f"{self.config.output_dir}, step {step}", "weights_sha256": None},
                },
                extra=task.extra,
            ).in_order([prompt.id for prompt in task.prompts])
            # A full disk on the first process must not leave the others waiting for it.
            trainer.backend.together(partial(self._save, result, folder / f"{task.name}.json"))
            numbers = result.metrics() | {name: found["value"] for name, found in result.also.items()}
            metrics |= {f"eval_{task.name}/{key}": value for key, value in numbers.items()}
        if own is not None:
            own.rest()
        return metrics

    def _save(self, result: EvalResult, file: Path) -> None:
        if self.trainer.backend.is_main:
            result.save(file)

    def close(self) -> None:
        """Ends the workers of the scorers; may be called twice."""
        self._stack.close()

    def __enter__(self) -> Benchmarks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, entry: BenchmarkRun) -> tuple[Task, EvalConfig]:
        """The benchmark as `llmrl eval` would read it; one seed for all runs, so that two evaluations differ by the model, not by the draw."""
        config = self.config
        settings = EvalConfig(
            model_name_or_path=config.model_name_or_path,
            benchmark=[entry.name],
            data_dir=config.benchmark_dir,
            chat_template_kwargs=config.chat_template_kwargs,
            **{k: getattr(entry, k) for k in ("template", "n", "temperature", "max_completion_length")},
        )
        task = benchmark_task(settings, entry.name)
        if task.spec.mode != "generate":
            raise ConfigError(
                f"benchmarks: {entry.name} compares log-probs; `llmrl eval` does that, a training run samples"
            )
        count = len(task.benchmark.problems)
        if entry.max_problems is not None and entry.max_problems < count:
            chosen = sorted(permutation(count, 0, _STREAM)[: entry.max_problems])
            task.benchmark = replace(task.benchmark, problems=[task.benchmark.problems[i] for i in chosen])
            task.rows = [task.rows[i] for i in chosen]
        return task, settings

    def _described(self) -> dict[str, Any]:
        """The manifest's engine. Its model is named at each evaluation by the step: hashing the weights then would cost more than it tells."""
        config, backend = self.config, self.trainer.backend
        kind = config.rollout.engine if hasattr(config, "rollout") else "local"
        dtype = f"{config.dtype}, {config.mixed_precision}, {backend.world_size} processes"
        return {"model": None, "engine": {"kind": kind, "version": package_version("llmrl"), "dtype": dtype}}

    def _own_engine(self) -> RolloutEngine:
        trainer: Any = self.trainer
        return LocalEngine(
            trainer.module,
            trainer.tokenizer,
            stop_token_ids=trainer.stop_ids,
            autocast=trainer.backend.autocast,
            twin=trainer.twin(trainer.module),
        )
