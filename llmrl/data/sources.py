"""Rows from the hub, from JSON, JSON Lines and Parquet files, and from Python; mixtures of them, chosen by seed."""

from __future__ import annotations

import gzip
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.config.data import DatasetSource
from llmrl.data.records import unfold
from llmrl.data.sampler import permutation
from llmrl.errors import DataError

FORMATS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class Row:
    """One record; `origin` says where it stands ("train.jsonl:12", lines and rows counted from 1), for error messages."""

    values: Mapping[str, Any]
    origin: str


Rows = list[Row]


def load_rows(sources: Sequence[DatasetSource], *, seed: int = 0, raw: bool = False) -> Rows:
    """The rows of all sources, one source after the other.

    Without weights every source gives all of its rows. With weights, source i gives its share w_i / sum(w) of the largest mixture
    that repeats no row. `max_rows` and weights choose rows at random, as a function of the seed, and keep their order.
    Records and open-instruct's rows become columns (`records.unfold`), unless they are wanted `raw`.
    Raises DataError for what can't be read, naming file and line.
    """
    tables = [_max_rows(_read(source), source, seed, i) for i, source in enumerate(sources)]
    counts = _mixture([len(table) for table in tables], sources)
    rows: Rows = []
    for i, (source, table, count) in enumerate(zip(sources, tables, counts)):
        chosen = _choose(table, count, seed, 2 * i + 1)
        rows += _mapped(chosen if raw else map(_unfolded, chosen), source)
    return rows


def rows_from(data: Any) -> Rows:
    """Rows handed over in Python: mappings in any iterable (a list, a `datasets.Dataset`, a generator), or `Row`s as they are."""
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        hint = f"; take one split: {sorted(map(str, data))}" if isinstance(data, Mapping) else ""
        raise DataError(f"a dataset must be a list of rows or a datasets.Dataset, not {type(data).__name__}{hint}")
    rows = []
    for i, item in enumerate(data):
        if isinstance(item, Row):
            rows.append(item)
        elif isinstance(item, Mapping):
            rows.append(_unfolded(Row(item, f"dataset[{i}]")))
        else:
            raise DataError(
                f"dataset[{i}] is {type(item).__name__}; every row must be a mapping of column names to values"
            )
    return rows


def _read(source: DatasetSource) -> Sequence[Row]:
    path = Path(source.path).expanduser()
    if path.is_file():
        if source.name is not None or source.split != "train":
            raise DataError(f"{source.path} is a file: it has no `name` and no `split`; leave both out")
        return list(_read_file(path, source.path))
    looks_local = source.path.endswith(FORMATS) or source.path.startswith((".", "/", "~"))
    if looks_local and not path.is_dir():
        raise DataError(f"{source.path} does not exist (current directory: {Path.cwd()})")
    return _read_hub(source)


def _read_file(path: Path, name: str) -> Iterator[Row]:
    if not name.endswith(FORMATS):
        raise DataError(f"{name}: unknown format; give one of {', '.join(FORMATS)}")
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(path, name)
        else:
            yield from _read_json(path, name)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{name} can't be read: {error}") from error


def _read_json(path: Path, name: str) -> Iterator[Row]:
    """Objects one a line, or (.json) one list of objects."""
    opener: Any = gzip.open if name.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        if name.removesuffix(".gz").endswith(".json"):
            text = file.read()
            if text.lstrip().startswith("["):
                for i, value in enumerate(_parse(text, name), start=1):
                    yield _row(value, f"{name}:{i}")
                return
            lines: Iterable[str] = text.split("\n")
        else:
            lines = file
        for i, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(_parse(line, f"{name}:{i}"), f"{name}:{i}")


def _parse(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # recursion: brackets in brackets, thousands deep
        raise DataError(
            f"{origin}: not JSON ({error}); expected one object a line, or a .json file that is one list of objects"
        ) from error


def _row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row must be a JSON object, got {type(value).__name__}")
    return Row(value, origin)


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name} can't be read: {error}") from error
    for i, values in enumerate(table.to_pylist(), start=1):
        yield Row(values, f"{name}:{i}")


class _HubRows(Sequence[Row]):
    """The rows of a `datasets.Dataset`, made when they are asked for: a mixture may need a few of millions."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: Any) -> Any:
        return Row(self.dataset[int(i)], f"{self.name}:{int(i) + 1}")

    def __iter__(self) -> Iterator[Row]:
        for i, values in enumerate(self.dataset, start=1):
            yield Row(values, f"{self.name}:{i}")


def _read_hub(source: DatasetSource) -> Sequence[Row]:
    import datasets

    label = f"{source.path}[{source.split}]"
    try:
        dataset = datasets.load_dataset(source.path, source.name, split=source.split)
    except (
        Exception
    ) as error:  # the library raises a dozen unrelated classes: network, missing split, bad configuration
        raise DataError(
            f"dataset {label} can't be loaded ({type(error).__name__}: {error}). Check the hub id, `name`, `split` and the "
            f"connection; a local file is given by its path"
        ) from error
    return _HubRows(dataset, label)


def _max_rows(table: Sequence[Row], source: DatasetSource, seed: int, i: int) -> Sequence[Row]:
    if not len(table):
        raise DataError(f"{source.path} has no rows")
    return _choose(table, min(source.max_rows or len(table), len(table)), seed, 2 * i)


def _choose(table: Sequence[Row], count: int, seed: int, stream: int) -> Sequence[Row]:
    if count >= len(table):
        return table
    # streams from 2**32 on: the sampler's epochs use the low ones
    return [table[i] for i in sorted(permutation(len(table), seed, 2**32 + stream)[:count].tolist())]


def _mixture(sizes: list[int], sources: Sequence[DatasetSource]) -> list[int]:
    """How many rows each source gives."""
    weights = [source.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return sizes
    if len(given) < len(weights):
        missing = [source.path for source in sources if source.weight is None]
        raise DataError(
            f"some sources have a weight, but not {', '.join(missing)}: give every source a weight, or none"
        )
    total = sum(given)
    rows = min(size * total / weight for size, weight in zip(sizes, given))
    return [max(1, min(size, round(rows * weight / total))) for size, weight in zip(sizes, given)]


def _unfolded(row: Row) -> Row:
    try:
        values = unfold(row.values)
    except DataError as error:
        raise DataError(f"{row.origin}: {error}") from None
    return row if values is row.values else Row(values, row.origin)


def _mapped(rows: Iterable[Row], source: DatasetSource) -> Iterator[Row]:
    """Rows with the columns renamed and the templates filled in."""
    if not (source.columns or source.prompt_template or source.completion_template):
        yield from rows
        return
    templates = {"prompt": source.prompt_template, "completion": source.completion_template}
    fields = {
        target: _fields(template, f"{target}_template")
        for target, template in templates.items()
        if template is not None
    }
    for row in rows:
        for target, column in source.columns.items():
            if column not in row.values:
                raise _no_column(row, column, f"`columns: {{{target}: {column}}}`")
        renamed = set(source.columns.values())
        values = {name: value for name, value in row.values.items() if name not in renamed}
        values |= {target: row.values[column] for target, column in source.columns.items()}
        known = {**row.values, **values}
        for target, names in fields.items():
            for name in names:
                if name not in known:
                    raise _no_column(row, name, f"{target}_template")
                if known[name] is None:
                    raise DataError(f"{row.origin}: column {name!r} is null, and {target}_template needs it")
            values[target] = str(templates[target]).format(**{name: known[name] for name in names})
        yield Row(values, row.origin)


def _fields(template: str, key: str) -> list[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"{key} {template!r}: {error}; write a literal brace twice: {{{{ or }}}}") from error
    names = [name for _, name, _, _ in parts if name is not None]
    bad = [name for name in names if not name.isidentifier()]
    if bad:
        raise DataError(
            f"{key} {template!r}: {{{bad[0]}}} is not a column name; use {{column}}, and write a literal brace twice: {{{{ or }}}}"
        )
    return list(dict.fromkeys(names))


def _no_column(row: Row, column: str, where: str) -> DataError:
    return DataError(f"{row.origin}: no column {column!r}, which {where} needs; columns: {', '.join(row.values)}")
