"""One HTML page about a run or about results: curves, numbers, a browser for samples. It holds everything and asks the network for nothing.

The page's data are JSON in `<script type="application/json">` elements. What the browser of samples filters by is a column each; the texts
are gzipped, a chunk of samples each, and unpacked only when they are looked at: 20,000 samples open as fast as 20.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from llmrl.errors import DataError
from llmrl.evaluation.result import FORMAT
from llmrl.train.files import write_atomically
from llmrl.train.plot import PANELS
from llmrl.train.records import read_metrics, read_rows

MAX_SAMPLES = 20_000
_CHUNK = 100
_PAGE = Path(__file__).with_name("page")
_FAILURES = ("error", "timeout", "malformed")


@dataclass
class _Source:
    """What the page shows of one run or one result file."""

    name: str
    kind: str
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    recipe: str = ""
    result: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0


def write_report(
    paths: Sequence[str | Path], output: str | Path | None = None, *, max_samples: int = MAX_SAMPLES
) -> Path:
    """Writes the page about run directories and result files; returns its path.

    `output` defaults to report.html in the (first) run directory, or `<result>.html` beside the (first) result. Of more samples than
    `max_samples`, whole steps, evenly spread, are kept; the page says how many were left out. Raises DataError for a path that is neither.
    """
    if not paths:
        raise DataError("give a run directory or a result file to report on")
    sources: list[_Source] = []
    for path in paths:
        sources.append(_read(Path(path), max_samples - sum(len(s.samples) for s in sources)))
    first = Path(paths[0])
    target = (
        Path(output) if output is not None else first / "report.html" if first.is_dir() else first.with_suffix(".html")
    )
    page = render(sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, page)
    except OSError as error:
        raise DataError(
            f"the page {target} can't be written: {error.strerror or error}; give a file, such as --output report.html"
        ) from error
    return target


def render(sources: Sequence[Any]) -> str:
    """The page as HTML."""
    samples = [{**sample, "source": number} for number, s in enumerate(sources) for sample in s.samples]
    columns = ("source", "step", "id", "reward", "outcome", "length")
    page = {
        "made": datetime.now().astimezone().isoformat(timespec="minutes"),
        "sources": [
            {
                "name": s.name, "kind": s.kind, "summary": s.summary, "recipe": s.recipe, "result": s.result, "metrics": s.metrics,
                "panels": panels(s.metrics), "left_out": s.left_out,
            }
            for s in sources
        ],
        "samples": {column: [sample[column] for sample in samples] for column in columns},
        "chunk": _CHUNK,
    }  # fmt: skip
    chunks = [_packed([sample["shown"] for sample in samples[i : i + _CHUNK]]) for i in range(0, len(samples), _CHUNK)]
    data = "\n".join(f'<script type="text/plain" class="chunk">{chunk}</script>' for chunk in chunks)
    parts = {
        "title": html.escape(", ".join(s.name for s in sources)),
        "style": (_PAGE / "page.css").read_text(encoding="utf-8"),
        "data": f'<script type="application/json" id="data">{_embedded(page)}</script>\n{data}',
        "script": (_PAGE / "page.js").read_text(encoding="utf-8"),
    }
    page_html = (_PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"<!-- (title|style|data|script) -->", lambda m: parts[m[1]], page_html)


def panels(metrics: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Which numbers are drawn together, the ones that people watch first; everything else a panel each, marked `more`."""
    found = [(title, [n for n in names if n in metrics]) for title, names in PANELS]
    found += [
        ("reward parts", _matching(metrics, r"rewards/.+/mean")),
        ("benchmarks", _matching(metrics, r"eval_.+/accuracy")),
        (
            "sampler against trainer: mean |difference| (nats)",
            _matching(metrics, r"sampling/.*(logp_difference/mean|canary_gap)"),
        ),
        ("share of completions cut by the limit", _matching(metrics, r"(eval_)?completions/clipped_ratio")),
        ("seconds a step", [n for n in ("step_time", "rollout/seconds") if n in metrics]),
        ("tokens a second", [n for n in ("tokens_per_second",) if n in metrics]),
    ]
    shown = {name for _, names in found for name in names} | {"step"}
    main = [{"title": title, "names": names, "more": False} for title, names in found if names]
    return main + [{"title": name, "names": [name], "more": True} for name in sorted(metrics) if name not in shown]


def _matching(metrics: Mapping[str, Any], pattern: str) -> list[str]:
    return [name for name in metrics if re.fullmatch(pattern, name)]


def _read(path: Path, max_samples: int) -> _Source:
    if path.is_dir() and ((path / "metrics.jsonl").exists() or (path / "summary.json").exists()):
        return _read_run(path, max_samples)
    if path.is_file():
        return _read_result(path, max_samples)
    what = "is no run directory (it has no metrics.jsonl)" if path.is_dir() else "does not exist"
    raise DataError(
        f"{path} {what}; give the output_dir of a training run, or a result file that `llmrl eval --output` wrote"
    )


def _read_run(path: Path, max_samples: int) -> _Source:
    rows = list(read_metrics(path / "metrics.jsonl"))
    names = sorted({name for row in rows for name, value in row.items() if _is_number(value)})
    summary = _json(path / "summary.json") if (path / "summary.json").exists() else {}
    recipe = path / "config.yaml"
    samples, left_out = _run_samples(path / "samples", max_samples)
    return _Source(
        name=path.resolve().name,
        kind=f"{summary.get('kind', 'training')} run",
        summary={k: v for k, v in summary.items() if k != "metrics"},
        metrics={name: [_number(row.get(name)) for row in rows] for name in names},
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        samples=samples,
        left_out=left_out,
    )


def _run_samples(folder: Path, most: int) -> tuple[list[dict[str, Any]], int]:
    """The samples of a run's steps, newest step last: all of them, or those of evenly spread steps."""
    files = sorted(folder.glob("step_*.jsonl"), key=lambda f: int(f.stem.removeprefix("step_")))
    counts = [sum(1 for _ in file.open("rb")) for file in files]
    chosen = set(_spread(counts, most))
    samples = []
    for i in sorted(chosen):
        step = int(files[i].stem.removeprefix("step_"))
        samples += [_run_sample(row, step) for row in read_rows(files[i])]
    return samples, sum(counts) - sum(counts[i] for i in chosen)


def _spread(counts: Sequence[int], most: int) -> Sequence[int]:
    """Which steps to keep so that at most `most` samples are shown: all, every n-th, or none; the last one is among them."""
    for every in range(1, len(counts) + 1):
        kept = range(len(counts) - 1, -1, -every)
        if sum(counts[i] for i in kept) <= most:
            return kept
    return ()


def _run_sample(row: Mapping[str, Any], step: int) -> dict[str, Any]:
    outcomes = row.get("outcomes") or {}
    reward = _number(row.get("reward"))
    outcome = next(
        (o for o in _FAILURES if o in outcomes.values()), "score" if reward is not None else "not-applicable"
    )
    return {
        "step": step, "id": str(row.get("prompt_id", "")), "reward": reward, "outcome": outcome, "length": row.get("length"),
        "shown": dict(row),
    }  # fmt: skip


def _read_result(path: Path, max_samples: int) -> _Source:
    result = _json(path)
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise DataError(f'{path} is not a result file: `llmrl eval --output` writes them, with "format": "{FORMAT}"')
    try:
        samples = [sample for row in result["per_row"] for sample in _result_samples(row)]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: a problem under per_row is not whole ({error!r}); evaluate again with llmrl eval --output"
        ) from error
    return _Source(
        name=f"{result.get('benchmark') or 'evaluation'} ({path.name})",
        kind="result",
        summary=dict(result.get("manifest") or {}),
        result={k: v for k, v in result.items() if k not in ("per_row", "manifest")},
        samples=samples[:max_samples],
        left_out=max(0, len(samples) - max_samples),
    )


def _result_samples(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    common = {key: row[key] for key in ("prompt", "gold", "meta") if row.get(key)}
    notes = row.get("notes") or [None] * len(row["completions"])
    for i, completion in enumerate(row["completions"]):
        shown = {
            "prompt_id": row["id"], **common, "completion": completion, "reward": row["rewards"][i], "answer": row["answers"][i],
            "correct": row["correct"][i], "finish_reason": row["finish"][i], "notes": {"scorer": notes[i]} if notes[i] else {},
        }  # fmt: skip
        yield {
            "step": None, "id": str(row["id"]), "reward": _number(row["rewards"][i]), "outcome": row["outcomes"][i],
            "length": row["lengths"][i], "shown": shown,
        }  # fmt: skip


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    """Four significant figures more than a screen can show, and what is no number as null."""
    return float(f"{value:.7g}") if _is_number(value) and value == value and abs(value) != float("inf") else None


def _embedded(value: Any) -> str:
    """JSON that can stand in a script element: no `</script>` or `<!--` in it, whatever a model wrote."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str).replace("<", "\\u003c")


def _packed(rows: Sequence[Mapping[str, Any]]) -> str:
    text = json.dumps(list(rows), ensure_ascii=False, separators=(",", ":"), default=str)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "surrogatepass"), 6, mtime=0)).decode()
