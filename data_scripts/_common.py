"""What the data scripts share: reading a hub data set or a local raw file, converting, duplicates, overlap with evaluation sets, writing."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmrl.config.data import DatasetSource
from llmrl.data import convert, convert_train
from llmrl.data.decontaminate import Overlap, prompt_hash, prompts_of
from llmrl.data.puzzles import generate
from llmrl.errors import LLMRLError
from llmrl.evaluation.benchmarks import load_spec, shipped

Rows = Iterable[dict[str, Any]]


def parser(doc: str | None, source: str | None = None, split: str = "train", name: str | None = None) -> argparse.ArgumentParser:  # fmt: skip
    """The arguments that scripts share: --source, --split and --name of what is read, --output, and --decontaminate."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    if source is not None:
        made.add_argument("--source", default=source, help="hub id, or a local raw file (.json, .jsonl, .parquet, also .gz) (default: %(default)s)")  # fmt: skip
        made.add_argument("--split", default=split, help="of the hub data set (default: %(default)s)")
        made.add_argument("--name", default=name, help="configuration of the hub data set, '' for none (default: %(default)s)")  # fmt: skip
    made.add_argument("--output", required=True, help="the JSON Lines file to write")
    made.add_argument("--decontaminate", nargs="+", metavar="PATH", help="evaluation sets, files or folders of them: rows that are close to one are dropped and listed")  # fmt: skip
    return made


def read(source: str, *, name: str | None = None, folder: str | None = None, split: str = "train") -> Rows:
    """Rows of a local file if `source` is one, else of (a folder of) the hub data set of that id. A row that is a list has columns "0", "1"."""
    path = Path(source).expanduser()
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(4096):
            yield from batch.to_pylist()
    elif path.is_file():
        yield from _local(path)
    elif path.exists() or source.startswith((".", "/", "~")) or source.endswith((".json", ".jsonl", ".gz", ".parquet")):
        raise SystemExit(f"{source} is no file (current directory: {Path.cwd()}); give one, or a hub id")
    else:
        from datasets import load_dataset

        yield from load_dataset(source, name or None, data_dir=folder, split=split)


def _local(path: Path) -> Iterator[dict[str, Any]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        if path.name.removesuffix(".gz").endswith(".json") and (text := file.read()).lstrip().startswith("["):
            values: Iterable[Any] = json.loads(text)
        else:
            file.seek(0)
            values = (json.loads(line) for line in file if line.strip())
        for value in values:
            yield {str(i): v for i, v in enumerate(value)} if isinstance(value, list) else value


def benchmark(doc: str | None, name: str, args: argparse.Namespace | None = None) -> None:
    """Writes a benchmark's problems as its file in llmrl/evaluation/specs says; a row that can't be used ends the script."""
    spec = load_spec(name)
    first = spec.data[0]
    args = args or parser(doc, first.path, first.split, first.name).parse_args()
    sources = [DatasetSource(path=args.source, name=args.name or None, split=args.split)]
    if (args.source, args.split, args.name) == (first.path, first.split, first.name):
        sources = spec.data
    rows = (row for s in sources for row in read(s.path, name=s.name, split=s.split))
    made = []
    for i, row in enumerate(rows):
        try:
            record = convert.read(row, i, convert.CONVERTERS[spec.convert])
        except LLMRLError as error:
            raise SystemExit(f"row {i}: {error}") from None
        made += [] if record is None else [record]
    if spec.problems and len(made) not in spec.problems:
        print(f"note: {len(made)} problems, but {spec.title} has {' or '.join(map(str, spec.problems))}: llmrl eval will refuse the file")  # fmt: skip
    write(made, args)


def training_set(doc: str | None, converter: convert.Converter, source: str, *, split: str = "train") -> None:
    """Writes a training set, converted, without duplicates."""
    args = parser(doc, source, split).parse_args()
    write(unique(converted(read(args.source, name=args.name, split=args.split), converter)), args)


def puzzles(doc: str | None, kind: str) -> None:
    """Writes puzzles made from a seed."""
    made = parser(doc)
    made.add_argument("--count", type=int, default=1000, help="how many (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="others for each seed (default: %(default)s)")
    made.add_argument(
        "--difficulty", default="3", help="1 to 8, or a range that takes turns, as 2-5 (default: %(default)s)"
    )
    args = made.parse_args()
    low, _, high = args.difficulty.partition("-")
    if not low.isdigit() or not (high or low).isdigit():
        raise SystemExit(f"--difficulty {args.difficulty}: give a number from 1 to 8, or a range such as 2-5")
    difficulties = range(int(low), int(high or low) + 1)
    try:
        made_up = generate(kind, args.count, seed=args.seed, difficulties=difficulties)
    except LLMRLError as error:
        raise SystemExit(str(error)) from None
    write(made_up, args)


def converted(rows: Rows, converter: convert.Converter, usable: Callable[[Any], str | None] | None = None) -> Rows:
    """The rows in their form; prints how many could not be used, and why. Ends the script when that is more than half of them.

    `usable` says why a converted row can't be used, or None.
    """
    reasons: Counter[str] = Counter()
    kept = 0
    for i, row in enumerate(rows):
        try:
            made = convert_train.read(row, i, converter)
            problem = None if made is None or usable is None else usable(made)
        except KeyError as error:
            raise SystemExit(f"row {i}: no column {error}; the row has: {', '.join(map(str, row))}") from None
        except LLMRLError as error:
            made, problem = None, str(error)
        if problem is not None:
            reasons[problem] += 1
        elif made is not None:
            kept += 1
            yield made
    if reasons:
        shown = "\n".join(f"  {count} x {reason}" for reason, count in reasons.most_common(20))
        print(f"{reasons.total()} rows left out:\n{shown}")
    if reasons.total() > kept:
        raise SystemExit(f"only {kept} rows can be used: is this the right file?")


def unique(rows: Rows) -> Rows:
    """Each prompt once (each whole conversation or pair, of those), the first one; prints how many were dropped."""
    seen: dict[str, Any] = {}
    dropped = differing = 0
    for row in rows:
        key = prompt_hash(row)
        if key in seen:
            dropped += 1
            differing += seen[key] != row.get("answer")
        else:
            seen[key] = row.get("answer")
            yield row
    note = f", {differing} of them with another answer" if differing else ""
    print(f"{dropped} duplicates dropped{note}")


def evaluation_texts(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(id, text) of evaluation sets: files, and of folders those that have the name of a benchmark, perhaps behind eval_ or code_."""
    names = (*shipped(), *(copy for name in shipped() for copy in load_spec(name).copies))
    for given in map(Path, paths):
        files = [given] if given.is_file() else sorted(f for f in given.glob("*.jsonl*") if _is_evaluation(f, names))
        if not files:
            raise SystemExit(f"--decontaminate {given}: no such file, or no evaluation set in this folder")
        for file in files:
            for i, row in enumerate(_local(file)):
                yield from ((str(row.get("id", f"{file.name}:{i + 1}")), text) for text in prompts_of(row))


def _is_evaluation(file: Path, names: Iterable[str]) -> bool:
    stem = file.name.partition(".")[0]
    return stem.startswith(("eval_", "code_")) or stem in names


def clean(rows: Rows, paths: Iterable[str]) -> Rows:
    """The rows that are close to no evaluation text; prints the others with what they are close to."""
    index = Overlap(evaluation_texts(paths))
    dropped = 0
    for row in rows:
        match = index.closest_of(prompts_of(row))
        if match is None:
            yield row
            continue
        dropped += 1
        print(
            f"  {row['id']} is close to {match.id} ({'same words' if match.exact else f'{match.share:.0%} of the 8-grams'})"
        )
    print(f"{dropped} rows dropped that are close to one of {len(index)} evaluation texts")


def write(rows: Rows, args: argparse.Namespace) -> None:
    """Writes the rows, less those to be dropped, and prints their number, the file's sha256 and the first row."""
    rows = list(clean(rows, args.decontaminate) if args.decontaminate else rows)
    if not rows:
        raise SystemExit(f"no rows for {args.output}: the source was empty, or nothing of it was kept")
    double = [id for id, count in Counter(row["id"] for row in rows).items() if count > 1]
    if double:
        raise SystemExit(f"{args.output}: {len(double)} ids are not unique ({', '.join(map(str, double[:3]))})")
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(
        "utf-8", "replace"
    )  # lone surrogates
    path = Path(args.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise SystemExit(f"--output {path} can't be written: {error.strerror or error}; give another file") from None
    counts: Mapping[str, int] = Counter(str(row["verifier"]) for row in rows if row.get("verifier"))
    by = f" ({', '.join(f'{name} {count}' for name, count in counts.items())})" if counts else ""
    print(f"{path}: {len(rows)} rows{by}, sha256 {hashlib.sha256(data).hexdigest()}")
    shown = json.dumps(rows[0], ensure_ascii=False, indent=1)
    print(shown if len(shown) <= 2000 else shown[:2000] + " ...")
