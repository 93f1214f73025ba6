"""Benchmarks: one declarative file each in `specs/`, or a user's own YAML; their problems, from the hub or from local copies."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmrl.config.benchmark import BenchmarkSpec, PromptTemplate
from llmrl.config.data import DatasetSource
from llmrl.config.load import load_file
from llmrl.data.convert import CONVERTERS, Converter, Record, read
from llmrl.data.sources import Row, load_rows
from llmrl.errors import ConfigError, DataError

SPECS = Path(__file__).with_name("specs")
_LOCAL = ("{name}.jsonl", "{name}.jsonl.gz", "eval_{name}.jsonl", "eval_{name}.jsonl.gz", "code_{name}.jsonl")
# As papers and other tools call them; hyphens, underscores and capitals don't matter.
_OTHER_NAMES = {
    "aime2024": "aime24", "aime2025": "aime25", "amc": "amc23", "amc2023": "amc23", "minerva": "minervamath",
    "olympiad": "olympiadbench", "gsm": "gsm8k", "arce": "arceasy", "arcc": "arcchallenge", "olymmath": "olymmathen",
    "mbppsanitized": "mbpp",
}  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that has been read: its name, what its file says, its problems in the form of `llmrl.data.convert`, their source, and
    the ids of the rows there that are not among its problems (other splits)."""

    name: str
    spec: BenchmarkSpec
    problems: list[Record]
    path: str = ""
    others: frozenset[str] = frozenset()


def shipped() -> list[str]:
    """Names of the benchmarks that come with llmrl."""
    return sorted(file.stem for file in SPECS.glob("*.yaml"))


def find_spec(name: str) -> Path:
    """The file of a benchmark: a shipped one's by its name, in any case, with hyphens, underscores or none, or as papers call it; or a
    user's by its path. Raises ConfigError for an unknown name, with the nearest ones.
    """
    if (own := Path(name).expanduser()).suffix in (".yaml", ".yml"):
        if own.is_file():
            return own
        raise ConfigError(f"benchmark {name}: there is no such file (current directory: {Path.cwd()})")
    known = {_plain(stem): stem for stem in shipped()}
    key = _plain(name)
    if (stem := known.get(_OTHER_NAMES.get(key, key))) is not None:
        return SPECS / f"{stem}.yaml"
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(known[n] for n in near)}?"
        if near
        else "give one of these, or the path of a YAML file."
    )
    raise ConfigError(f"no benchmark {name!r}: {hint} Those that come with llmrl: {', '.join(shipped())}")


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def load_spec(name: str) -> BenchmarkSpec:
    """What a benchmark's file says. Raises ConfigError for an unknown name, with the nearest ones, and for what is wrong in the file."""
    return load_file(BenchmarkSpec, find_spec(name))


def load_benchmark(name: str, data_dir: str | Path | None = None, data: Sequence[DatasetSource] = ()) -> Benchmark:
    """A shipped benchmark by name, or a user's by the path of its YAML file.

    The problems come from `data` where that is given; those of a shipped one from `data_dir` where that is (`NAME.jsonl` as the data
    scripts write it, or `eval_NAME.jsonl`); else from where the benchmark's file says. Raises ConfigError for an unknown benchmark or a missing copy,
    DataError for rows that can't be used.
    """
    file = find_spec(name)
    spec = load_file(BenchmarkSpec, file)
    convert = CONVERTERS.get(spec.convert)
    if convert is None:
        near = ", ".join(difflib.get_close_matches(spec.convert, CONVERTERS, n=3, cutoff=0.4) or sorted(CONVERTERS))
        raise ConfigError(f"benchmark {name}: convert {spec.convert!r} is not known; there are: {near}")
    if data:
        sources = list(data)
    elif data_dir is not None and file.parent == SPECS:
        sources = [DatasetSource(path=str(local_copy([file.stem, *spec.copies], Path(data_dir))))]
    else:
        sources = [_beside(source, file) for source in spec.data]
    problems, others = _converted(load_rows(sources, seed=0, raw=True), convert)
    path = " and ".join(source.path for source in sources)
    _check(file.stem, spec, problems, path)
    return Benchmark(file.stem, spec, problems, path, others)


def _beside(source: DatasetSource, file: Path) -> DatasetSource:
    """A path that names a file beside the benchmark's own means that file."""
    beside = file.parent / source.path
    return source.model_copy(update={"path": str(beside)}) if beside.is_file() else source


def local_copy(names: Sequence[str], folder: Path) -> Path:
    """The file of a folder that holds a benchmark's problems, under any of its names. Raises ConfigError, saying what was looked for."""
    if not folder.is_dir():
        raise ConfigError(
            f"data_dir {folder} is no directory (for one file: --data FILE; current directory: {Path.cwd()})"
        )
    wanted = [pattern.format(name=name) for name in names for pattern in _LOCAL]
    for file in wanted:
        if (folder / file).is_file():
            return folder / file
    raise ConfigError(
        f"data_dir {folder} has no copy of {names[0]} (looked for {', '.join(wanted)}); write one with the script of that name in "
        "data_scripts/, or leave data_dir out to load it from the hub"
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
    meta = problem["meta"]
    parts = {
        "question": problem["messages"][-1]["content"],
        "choices": "\n".join(f"{c['label']}. {c['text']}" for c in meta.get("choices", ())),
        "tests": "\n".join(meta.get("tests", ())),
    }

    def filled(text: str) -> str:  # in one pass: a problem that itself holds "{choices}" is left as it is
        return re.sub(r"\{(question|choices|tests)\}", lambda m: parts[m[1]], text)

    earlier = problem["messages"][:-1]
    if template.text is not None:
        if earlier:
            raise DataError(
                f"problem {problem['id']} is a conversation of several turns; a plain-text template can't hold it"
            )
        return filled(template.text)
    system = [{"role": "system", "content": template.system}] if template.system is not None else []
    return [*system, *earlier, {"role": "user", "content": filled(template.user or "")}]


def _converted(rows: Sequence[Row], convert: Converter) -> tuple[list[Record], frozenset[str]]:
    problems, others = [], set()
    for index, row in enumerate(rows):
        try:
            problem = read(row.values, index, convert)
        except DataError as error:
            raise DataError(f"{row.origin}: {error}") from None
        if problem is not None:
            problems.append(problem)
        else:
            others.add(str(row.values.get("id", row.values.get("task_id"))))
    return problems, frozenset(others)


def _check(name: str, spec: BenchmarkSpec, problems: list[Record], path: str) -> None:
    """Another number of problems, or an id twice, would be another benchmark under the same name."""
    twice = [id for id, count in Counter(p["id"] for p in problems).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: {len(twice)} ids stand more than once ({', '.join(twice[:5])}); each problem needs its own"
        )
    if not problems:
        raise DataError(f"{path}: no problems")
    if spec.problems and len(problems) not in spec.problems:
        raise DataError(
            f"{path}: {len(problems)} problems, but {name} has {' or '.join(map(str, spec.problems))}; its numbers would not be "
            "comparable. A subset is a benchmark of its own: write a YAML file for it"
        )
