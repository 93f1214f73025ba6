"""Benchmarks while a model trains: the same files, scorers and numbers as `llmrl eval`, sampled from the weights of now."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmrl.config.benchmark import BenchmarkRun, PromptTemplate
from llmrl.data.build import prompts_from_rows
from llmrl.data.sampler import permutation
from llmrl.errors import ConfigError
from llmrl.evaluation.benchmarks import Benchmark, asked, find_template, load_benchmark
from llmrl.evaluation.judges import LocalJudges
from llmrl.evaluation.runner import evaluate
from llmrl.rewards.runner import RewardRunner
from llmrl.rollout.local import LocalEngine
from llmrl.types import Prompt, RolloutEngine, Sampling

if TYPE_CHECKING:
    from llmrl.algorithms.base import Trainer

logger = logging.getLogger("llmrl")
_STREAM = 2**34
"""Of the random numbers that choose `max_problems`."""


@dataclass(frozen=True)
class _Entry:
    benchmark: Benchmark
    template: PromptTemplate
    prompts: list[Prompt]
    n: int
    sampling: Sampling


class Benchmarks:
    """The recipe's `benchmarks`, read and tokenised when a trainer is made, so that what is wrong with them ends no long run."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config = trainer, trainer.config
        self._scorers: dict[str, RewardRunner] = {}
        self.entries = [self._read(entry) for entry in getattr(self.config, "benchmarks", ())]
        names = [entry.benchmark.name for entry in self.entries]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"benchmarks: one of {', '.join(names)} stands twice; their numbers would hide each other"
            )

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its completion; 0 without benchmarks."""
        return max((len(p.ids) + e.sampling.max_tokens for e in self.entries for p in e.prompts), default=0)

    def evaluate(self, step: int, engine: RolloutEngine | None = None) -> dict[str, float]:
        """Every benchmark's numbers as eval_<benchmark>/accuracy, ...; the results go to `<output_dir>/evaluations/step_<step>/`.

        `engine` samples with the weights of now; by default the model that is trained does. All processes call it, each samples its
        share of the problems.
        """
        if not self.entries:
            return {}
        backend, metrics = self.trainer.backend, dict[str, float]()
        engine = engine or self._own_engine()
        folder = Path(self.config.output_dir) / "evaluations" / f"step_{step:08d}"
        for entry in self.entries:
            name, spec = entry.benchmark.name, entry.benchmark.spec
            result = evaluate(
                entry.prompts[backend.rank :: backend.world_size],
                engine,
                self._scorer(entry.benchmark),
                n=entry.n,
                sampling=entry.sampling,
                threshold=spec.threshold,
                gather=backend.gather_json,
                trainer_state={"global_step": step, "max_steps": self.trainer.run.total_steps},
                name=name,
                judged_by=spec.scorer,
                breakdown=spec.breakdown,
                cut=entry.template.cut,
            )
            if backend.is_main:
                result.save(folder / f"{name}.json")
            metrics |= {f"eval_{name}/{key}": value for key, value in result.metrics().items()}
        return metrics

    def close(self) -> None:
        """Ends the workers of the scorers; may be called twice."""
        for scorer in self._scorers.values():
            scorer.close()
        self._scorers.clear()

    def __enter__(self) -> Benchmarks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, entry: BenchmarkRun) -> _Entry:
        config, trainer = self.config, self.trainer
        benchmark = load_benchmark(entry.name, config.benchmark_dir)
        spec = benchmark.spec
        if spec.mode != "generate":
            raise ConfigError(
                f"benchmarks: {entry.name} compares log-probs; `llmrl eval` does that, a training run samples"
            )
        changed = {
            k: getattr(entry, k) for k in ("n", "temperature", "max_completion_length") if getattr(entry, k) is not None
        }
        if changed.get("n", 1) > 1 and "temperature" not in changed and spec.temperature == 0:
            changed["temperature"] = 1.0
        spec = spec.model_copy(update=changed)
        if spec.n > 1 and spec.temperature == 0:
            raise ConfigError(
                f"benchmarks: temperature 0 gives n={spec.n} equal completions of a problem of {entry.name}; use n: 1"
            )
        if entry.max_problems is not None and entry.max_problems < len(benchmark.problems):
            chosen = sorted(permutation(len(benchmark.problems), 0, _STREAM)[: entry.max_problems])
            benchmark = replace(benchmark, problems=[benchmark.problems[i] for i in chosen])
        benchmark = replace(benchmark, spec=spec)
        prompts, _ = prompts_from_rows(
            asked(benchmark, entry.template),
            trainer.tokenizer,
            chat_template_kwargs=config.chat_template_kwargs,
            max_prompt_length=self._room(spec.max_completion_length, entry.name),
            on_overlong="truncate",  # a problem that is left out would make another benchmark
        )
        bad = self._scorer(benchmark).check_golds(prompts)
        if bad:
            listed = "; ".join(f"{b.prompt_id} ({b.reason})" for b in bad[:5])
            logger.warning(
                "%s: %d reference answers can't be used, so their problems count as wrong: %s",
                entry.name,
                len(bad),
                listed,
            )
        # One seed for all runs and steps: what differs between two evaluations is the model, not the draw.
        sampling = Sampling(spec.max_completion_length, temperature=spec.temperature, top_p=spec.top_p, seed=0)
        return _Entry(benchmark, find_template(benchmark, entry.template), prompts, spec.n, sampling)

    def _room(self, completion: int, name: str) -> int | None:
        positions = getattr(self.trainer.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return None
        if positions <= completion:
            raise ConfigError(
                f"benchmarks: {name} samples up to {completion} tokens, and the model has {positions} positions; set "
                "max_completion_length of the benchmark"
            )
        return int(positions) - completion

    def _scorer(self, benchmark: Benchmark) -> RewardRunner:
        """Benchmarks with the same scorer share its workers."""
        spec = benchmark.spec.scorer
        key = json.dumps(spec.model_dump(mode="json"))
        if key not in self._scorers:
            self._scorers[key] = RewardRunner(
                [spec],
                on_error="skip",
                workers=2,
                allow_code_execution=self.config.allow_code_execution,
                make_judge=LocalJudges(),
            )
        return self._scorers[key]

    def _own_engine(self) -> RolloutEngine:
        trainer = self.trainer
        return LocalEngine(
            trainer.module, trainer.tokenizer, stop_token_ids=trainer.stop_ids, autocast=trainer.backend.autocast
        )
