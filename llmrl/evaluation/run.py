"""Evaluations as `llmrl eval` runs them: everything is checked before anything is sampled, and what was sampled is never lost."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrl.config.benchmark import BenchmarkSpec, PromptTemplate
from llmrl.config.evaluation import EvalConfig, resolved
from llmrl.config.reward import RewardSpec
from llmrl.data.build import prompts_from_rows
from llmrl.data.sources import Row, load_rows
from llmrl.errors import ConfigError
from llmrl.evaluation.also import scorers
from llmrl.evaluation.benchmarks import Benchmark, asked, find_spec, find_template, load_benchmark
from llmrl.evaluation.choices import logprobs, read_choices, result_of
from llmrl.evaluation.engines import EvalEngine, LocalModel, open_engine
from llmrl.evaluation.journal import SCORING, Journal, journal_path
from llmrl.evaluation.judges import LocalJudges
from llmrl.evaluation.manifest import (
    data_entry,
    differences,
    digest_of,
    template_entry,
    verifier_entry,
    versions,
)
from llmrl.evaluation.predictions import score_predictions
from llmrl.evaluation.result import EvalResult
from llmrl.evaluation.runner import Bar, Sampler, evaluate
from llmrl.models.digest import tokenizer_digest
from llmrl.models.source import Source
from llmrl.rewards.runner import RewardRunner
from llmrl.train.launch import local_device
from llmrl.types import Prompt, Sampling

_SLOW = 2.0
"""Seconds that hashing the weights may take without a word."""


@dataclass
class Task:
    """One benchmark with everything that its evaluation needs, checked."""

    benchmark: Benchmark
    template_name: str | None
    template: PromptTemplate | None
    rows: list[Row]
    output: Path | None
    scorer: RewardRunner | None = None
    prompts: list[Prompt] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    done: EvalResult | None = None

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def spec(self) -> BenchmarkSpec:
        return self.benchmark.spec


def run_evaluation(
    config: EvalConfig, *, progress: bool = False, say: Callable[[str], None] = lambda text: None
) -> list[EvalResult]:
    """A result a benchmark, in order; they share one model, which is loaded when everything about all of them was found to be in order.

    `say` is told what a user should know. Raises ConfigError and DataError for whatever can't work, before anything is sampled.
    """
    if config.predictions is not None:
        return [_judge(config, config.predictions, progress)]
    tasks = _tasks(config)
    with ExitStack() as stack:
        open_scorers(tasks, stack, allow_code_execution=config.allow_code_execution)
        source = Source(config)
        tokenizer = source.tokenizer()
        for task in tasks:
            read_prompts(config, task, tokenizer)
            for note in task.notes:
                say(f"{task.name}: {note}")
        engine = open_engine(config, source, tokenizer)
        stack.callback(engine.close)
        longest = max(check_lengths(config, task, tokenizer, engine.limit) for task in tasks)
        began = time.monotonic()
        described = engine.describe()
        if (seconds := time.monotonic() - began) > _SLOW:
            say(f"the weights were hashed in {seconds:.0f} s")
        for task in tasks:
            task.manifest = manifest_of(config, task, tokenizer, described)
            task.done = _finished(config, task, say)
            if task.done is None and task.spec.mode == "generate":
                with _journal(
                    config, task
                ):  # one of other settings is refused now, not after hours of another benchmark
                    pass
        todo = [task for task in tasks if task.done is None]
        sampler = engine.start(longest) if any(t.spec.mode == "generate" for t in todo) else None
        return [task.done or _evaluate(config, task, engine, sampler, tokenizer, progress) for task in tasks]


def _judge(config: EvalConfig, predictions: str, progress: bool) -> EvalResult:
    """Completions of a file, without a model."""
    (name,) = config.benchmark
    find_spec(name)
    benchmark = load_benchmark(name, config.data_dir, config.data)
    benchmark = replace(benchmark, spec=resolved(benchmark.spec, config))
    output = _output(config, benchmark.name, 1)
    if output is not None and output.exists() and not config.overwrite:
        raise ConfigError(f"output: {output} is there already; give another --output, or --overwrite")
    result = score_predictions(
        benchmark,
        predictions,
        allow_missing=config.allow_missing,
        allow_code_execution=config.allow_code_execution,
        progress=progress,
    )
    return result if output is None else replace(result, path=result.save(output))


def _tasks(config: EvalConfig) -> list[Task]:
    """What is to be done, read from files; nothing of the model yet."""
    for name in config.benchmark:
        find_spec(name)  # all names, before any data are read
    tasks = [benchmark_task(config, name) for name in config.benchmark] or [_file_task(config)]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"benchmark: two are called alike ({', '.join(names)}); evaluate one at a time")
    for task in tasks:
        if task.spec.mode == "choices" and config.rollout.engine != "local":
            raise ConfigError(
                f"{task.name} compares log-probs of given texts, which rollout.engine {config.rollout.engine} does not give; use the local "
                "engine for it"
            )
        task.output = _output(config, task.name, len(tasks))
    return tasks


def benchmark_task(config: EvalConfig, name: str) -> Task:
    """The benchmark's problems as prompts' rows, by the template and with the settings of `config`."""
    read = load_benchmark(name, config.data_dir, config.data)
    benchmark = replace(read, spec=resolved(read.spec, config))
    template = find_template(benchmark, config.template)
    called = next(key for key, value in benchmark.spec.prompts.items() if value is template)
    return Task(benchmark, called, template, asked(benchmark, config.template), None)


def _file_task(config: EvalConfig) -> Task:
    """A file of problems as a benchmark: its rows are prompts already."""
    rows = load_rows(config.data, seed=0)  # the same problems whatever the sampling seed
    path = " and ".join(source.path for source in config.data)
    spec = BenchmarkSpec(
        title=path,
        data=config.data,
        prompts={"as given": PromptTemplate(text="{question}")},
        scorer=config.scorer or RewardSpec(function="math_answer"),
        max_completion_length=512,
    )
    first = Path(config.data[0].path).name
    name = first.removesuffix(".gz").rpartition(".")[0] or first
    return Task(
        Benchmark(name, resolved(spec, config), [dict(row.values) for row in rows], path), None, None, rows, None
    )


def _output(config: EvalConfig, name: str, count: int) -> Path | None:
    """The result's file; its directory is made. Raises ConfigError for one that can't be written."""
    if config.output is None:
        return None
    given = Path(config.output)
    if given.suffix == ".json" and count > 1:
        raise ConfigError(f"output: {given} is one file, and there are {count} benchmarks; give a directory")
    file = given if given.suffix == ".json" else given / f"{name}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {file.parent} can't be made ({error}); give the path of a new file") from error
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"output: {file} can't be written; give the path of a file, such as results.json")
    return file


def open_scorers(tasks: Sequence[Task], stack: ExitStack, *, allow_code_execution: bool) -> None:
    """Tasks with the same scorer share its workers. Raises ConfigError for one that runs code where that was not allowed."""
    opened: dict[str, RewardRunner] = {}

    for task in tasks:
        if task.spec.mode == "choices":
            continue
        specs = scorers(task.spec)
        key = json.dumps([spec.model_dump(mode="json") for spec in specs])
        if key not in opened:
            runner = RewardRunner(
                specs,
                on_error="skip",
                workers=2,
                device=local_device(),
                allow_code_execution=allow_code_execution,
                make_judge=LocalJudges(),
            )
            opened[key] = stack.enter_context(runner)
        task.scorer = opened[key]


def read_prompts(config: EvalConfig, task: Task, tokenizer: Any) -> None:
    if task.template is not None and task.template.text is None and not getattr(tokenizer, "chat_template", None):
        plain = [name for name, template in task.spec.prompts.items() if template.text is not None]
        hint = (
            f"--template {plain[0]} asks it as plain text, as base models are asked"
            if plain
            else "no template of it is plain text"
        )
        raise ConfigError(
            f"{task.name} is asked as a conversation (template {task.template_name}), and the tokenizer of "
            f"{config.tokenizer_name_or_path or config.model_name_or_path} has no chat template: {hint}; or set chat_template="
        )
    task.prompts, report = prompts_from_rows(
        task.rows,
        tokenizer,
        system_prompt=config.system_prompt,
        chat_template_kwargs=config.chat_template_kwargs,
        max_prompt_length=config.max_prompt_length,
        on_overlong="truncate",  # a problem that is left out would make another benchmark
    )
    task.notes += report.notes
    if report.truncated:
        task.extra["truncated_prompts"] = report.truncated
        task.notes.append(f"{report.truncated} prompts cut at max_prompt_length {config.max_prompt_length}")
    bad = task.scorer.check_golds(task.prompts) if task.scorer is not None else []
    if bad:
        task.extra["unusable_answers"] = [{"id": b.prompt_id, "reason": b.reason} for b in bad]
        ids = ", ".join(b.prompt_id for b in bad[:5])
        task.notes.append(
            f"the scorer can't use the reference answer of {len(bad)} problems, which count as wrong: {ids}"
        )


def check_lengths(config: EvalConfig, task: Task, tokenizer: Any, limit: int | None) -> int:
    """Tokens of the longest prompt with its completion. Raises ConfigError where the model takes fewer."""
    if task.spec.mode == "choices":
        longest = max(problem.longest for problem in read_choices(task.prompts, tokenizer))
        if limit is not None and longest > limit:
            raise ConfigError(
                f"{task.name}: the longest prompt with its choice has {longest} tokens, and the model takes {limit}"
            )
        return longest
    prompt = max(task.prompts, key=lambda p: len(p.ids))
    most, room = len(prompt.ids), task.spec.max_completion_length
    if limit is not None and most + room > limit:
        fits = limit - most
        remedy = (
            f"set max_completion_length={fits} or less"
            if fits > 0
            else "the model can't be asked this at all; max_prompt_length keeps the end of such prompts"
        )
        raise ConfigError(
            f"{task.name}: prompt {prompt.id!r} has {most} tokens, and with max_completion_length {room} that makes {most + room}; the model "
            f"takes {limit}: {remedy}"
        )
    return most + room


def manifest_of(config: EvalConfig, task: Task, tokenizer: Any, described: Mapping[str, Any]) -> dict[str, Any]:
    spec = task.spec
    sampling: dict[str, Any] = {"mode": spec.mode}
    if spec.mode == "generate":
        sampling |= {key: getattr(spec, key) for key in ("n", "temperature", "top_p", "max_completion_length")}
        sampling |= {key: getattr(config, key) for key in ("top_k", "min_p", "max_prompt_length")}
    else:
        sampling["metric"] = spec.metric
    conversational = any(not isinstance(prompt.text, str) for prompt in task.prompts)
    verifier = verifier_entry(spec.scorer, spec.threshold) if spec.mode == "generate" else None
    return {
        "model": described["model"],
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "template": template_entry(task.template_name, task.template, config.system_prompt),
        "chat_template_sha256": digest_of(tokenizer.chat_template) if conversational else None,
        "chat_template_kwargs": config.chat_template_kwargs if conversational else {},
        "sampling": sampling,
        "engine": described["engine"],
        "data": data_entry(task.benchmark.path, task.benchmark.problems),
        "seed": config.seed,
        "verifier": verifier,
        "versions": versions(),
    }


def _finished(config: EvalConfig, task: Task, say: Callable[[str], None]) -> EvalResult | None:
    """The result that is there already, if it is this evaluation's; None where there is something to do.

    One that was judged by other verifiers, or has fewer samples, is made anew from the samples beside it. Raises ConfigError for the
    result of another evaluation.
    """
    if task.output is None or not task.output.exists() or config.overwrite:
        return None
    try:
        found = EvalResult.load(task.output)
    except ValueError as error:
        raise ConfigError(
            f"output: {task.output} is there and is no result of llmrl ({error}); give another --output, or --overwrite"
        ) from error
    different = differences(found.manifest, task.manifest)
    if not different:
        say(f"{task.name}: {task.output} is complete and of the same settings, so nothing was done")
        return found
    fewer = found.manifest.get("sampling", {}).get("n", 1) <= task.manifest["sampling"].get("n", 1)
    ignored = (*SCORING, *(["sampling.n"] if fewer else []))
    if serious := differences(found.manifest, task.manifest, ignore=ignored):
        raise ConfigError(
            f"output: {task.output} is the result of another evaluation: {'; '.join(serious)}. Give another --output, or --overwrite"
        )
    say(f"{task.name}: {task.output} is made anew: {'; '.join(different)}")
    return None


@contextmanager
def _journal(config: EvalConfig, task: Task) -> Iterator[Journal | None]:
    if task.output is None:
        yield None
        return
    with Journal(journal_path(task.output), task.manifest, overwrite=config.overwrite) as journal:
        yield journal


def _evaluate(
    config: EvalConfig, task: Task, engine: EvalEngine, sampler: Sampler | None, tokenizer: Any, progress: bool
) -> EvalResult:
    spec = task.spec
    if spec.mode == "choices":
        assert isinstance(engine, LocalModel)
        result = _compare(task, engine, tokenizer, progress)
    else:
        assert task.scorer is not None and sampler is not None
        sampling = Sampling(
            max_tokens=spec.max_completion_length,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            seed=config.seed,
        )
        with _journal(config, task) as journal:
            result = evaluate(
                task.prompts,
                sampler,
                task.scorer,
                n=spec.n,
                sampling=sampling,
                batch_size=config.batch_size,
                progress=progress,
                threshold=spec.threshold,
                name=task.name,
                judged_by=spec.scorer,
                breakdown=spec.breakdown,
                also=spec.also,
                cut=task.template.cut if task.template is not None else (),
                journal=journal,
                manifest=task.manifest,
                extra=task.extra,
            )
    if task.output is None:
        return result
    return replace(result, path=result.save(task.output))


def _compare(task: Task, engine: LocalModel, tokenizer: Any, progress: bool) -> EvalResult:
    """Log-probs of the choices. They take one forward a problem, so they are not written down one by one."""
    problems = read_choices(task.prompts, tokenizer)
    with Bar(progress, task.name, len(problems)) as bar:
        found = logprobs(problems, engine.module(), autocast=engine.autocast, on_problems=bar.advance)
    return result_of(task.benchmark, problems, task.prompts, found, manifest=task.manifest)
