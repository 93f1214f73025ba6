"""Benchmarks: one declarative file each in `specs/`, or a user's own YAML; their problems, from the hub or from local copies."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.config.benchmark import BenchmarkSpec, PromptTemplate
from llmrl.config.data import DatasetSource
from llmrl.config.load import load_file
from llmrl.data.convert import CONVERTERS, Record, is_record
from llmrl.data.sources import Row, load_rows
from llmrl.errors import ConfigError, DataError

SPECS = Path(__file__).with_name("specs")
_LOCAL = ("{name}.jsonl", "{name}.jsonl.gz", "eval_{name}.jsonl", "eval_{name}.jsonl.gz", "code_{name}.jsonl")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that has been read: its name, what its file says, and its problems in the form of `llmrl.data.convert`."""

    name: str
    spec: BenchmarkSpec
    problems: list[Record]


def shipped() -> list[str]:
    """Names of the benchmarks that come with llmrl."""
    return sorted(file.stem for file in SPECS.glob("*.yaml"))


def load_spec(name: str) -> BenchmarkSpec:
    """What a benchmark's file says. Raises ConfigError for an unknown name, with the nearest ones."""
    file = SPECS / f"{name}.yaml" if name in shipped() else Path(name)
    if file.suffix in (".yaml", ".yml") and file.is_file():
        return load_file(BenchmarkSpec, file)
    near = difflib.get_close_matches(name, shipped(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "give one of those, or the path of a YAML file"
    raise ConfigError(f"no benchmark {name!r}: {hint} Those that come with llmrl: {', '.join(shipped())}")


def load_benchmark(name: str, data_dir: str | Path | None = None) -> Benchmark:
    """A shipped benchmark by name, or a user's by the path of its YAML file.

    The problems come from `data_dir` where it holds a copy (`NAME.jsonl` as the data scripts write it, or `eval_NAME.jsonl`), else from
    where the benchmark's file says. Raises ConfigError for an unknown benchmark or a missing copy, DataError for rows that can't be used.
    """
    spec = load_spec(name)
    stem = Path(name).stem
    source = spec.data
    if data_dir is not None and name in shipped():
        source = DatasetSource(path=str(local_copy(stem, Path(data_dir))))
    convert = CONVERTERS.get(spec.convert)
    if convert is None:
        near = ", ".join(difflib.get_close_matches(spec.convert, CONVERTERS, n=3, cutoff=0.4) or sorted(CONVERTERS))
        raise ConfigError(f"benchmark {name}: convert {spec.convert!r} is not known; there are: {near}")
    problems = [_converted(row, i, convert, spec) for i, row in enumerate(load_rows([source], seed=0))]
    _check(stem, spec, problems, source.path)
    return Benchmark(stem, spec, problems)


def local_copy(name: str, folder: Path) -> Path:
    """The file of a folder that holds a benchmark's problems. Raises ConfigError, saying what was looked for."""
    wanted = [pattern.format(name=name) for pattern in _LOCAL]
    for file in wanted:
        if (folder / file).is_file():
            return folder / file
    raise ConfigError(
        f"data_dir {folder} has no copy of {name} (looked for {', '.join(wanted)}); write one with data_scripts/{name}.py, or leave "
        "data_dir out to load it from the hub"
    )


def asked(benchmark: Benchmark, template: str | None = None) -> list[Row]:
    """The problems as rows of prompts: the column `prompt` by the template, and answer, verifier and everything in `meta` beside it.

    Raises ConfigError for a template that the benchmark does not have.
    """
    chosen = find_template(benchmark, template)
    rows = []
    for problem in benchmark.problems:
        columns = {**problem["meta"], "id": problem["id"], "answer": problem["answer"], "verifier": problem["verifier"]}
        rows.append(Row({**columns, "prompt": _fill(chosen, problem)}, f"{benchmark.name}:{problem['id']}"))
    return rows


def find_template(benchmark: Benchmark, name: str | None) -> PromptTemplate:
    """The template of that name, the first one for None."""
    prompts = benchmark.spec.prompts
    if name is not None and name not in prompts:
        raise ConfigError(f"benchmark {benchmark.name} has no template {name!r}; it has: {', '.join(prompts)}")
    return prompts[name] if name is not None else next(iter(prompts.values()))


def _fill(template: PromptTemplate, problem: Record) -> str | list[dict[str, str]]:
    choices = "\n".join(f"{c['label']}. {c['text']}" for c in problem["meta"].get("choices", ()))
    question = problem["messages"][-1]["content"]

    def filled(text: str) -> str:  # in one pass: a problem that itself holds "{choices}" is left as it is
        return re.sub(r"\{(question|choices)\}", lambda m: question if m[1] == "question" else choices, text)

    if template.text is not None:
        return filled(template.text)
    system = [{"role": "system", "content": template.system}] if template.system is not None else []
    return [*system, {"role": "user", "content": filled(template.user or "")}]


def _converted(row: Row, index: int, convert: Any, spec: BenchmarkSpec) -> Record:
    if is_record(row.values):
        return dict(row.values)
    try:
        record: Record = convert(row.values, index)
    except KeyError as error:
        columns = ", ".join(map(str, row.values))
        raise DataError(f"{row.origin}: no column {error} ({spec.convert} reads it); the row has: {columns}") from None
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from None
    return record


def _check(name: str, spec: BenchmarkSpec, problems: list[Record], path: str) -> None:
    """Another number of problems, or an id twice, would be another benchmark under the same name."""
    twice = [id for id, count in Counter(p["id"] for p in problems).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: {len(twice)} ids stand more than once ({', '.join(twice[:5])}); each problem needs its own"
        )
    if not problems:
        raise DataError(f"{path}: no problems")
    if spec.problems is not None and len(problems) != spec.problems:
        raise DataError(
            f"{path}: {len(problems)} problems, but {name} has {spec.problems}; its numbers would not be comparable. A subset is a "
            "benchmark of its own: write a YAML file for it"
        )
