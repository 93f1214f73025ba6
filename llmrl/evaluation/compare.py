"""Two result files of one benchmark, compared problem by problem; whether they can be compared is asked first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrl.errors import DataError
from llmrl.evaluation.metrics import accuracy_interval
from llmrl.evaluation.paired import difference_interval, differences, sign_flip_p_value
from llmrl.evaluation.result import FORMAT

_SETTINGS = ("template", "sampling", "engine.kind", "engine.dtype")
"""Parts of a manifest that the numbers may depend on, and that one may want to compare."""


@dataclass(frozen=True)
class Flip:
    """A problem with its shares of right samples in A and in B."""

    id: str
    a: float
    b: float


@dataclass(frozen=True)
class Side:
    """One of the two results, over the problems that both have."""

    file: str
    model: str
    samples: int
    accuracy: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """B against A. `won`: the problems where B is better, `lost`: where A is, the largest changes first. `objections`: why the two can't
    be compared, where that was overruled."""

    benchmark: str
    problems: int
    a: Side
    b: Side
    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str
    won: list[Flip]
    lost: list[Flip]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    objections: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        values = {key: value for key, value in vars(self).items() if key not in ("a", "b", "won", "lost")}
        flips = {name: [vars(flip) for flip in flips] for name, flips in (("won", self.won), ("lost", self.lost))}
        return {"format": "llmrl-comparison/1", "a": vars(self.a), "b": vars(self.b), **values, **flips}


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file of `llmrl eval`. Raises DataError for what is none, or holds no problem or no sample of one."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path} can't be read: {error.strerror or error}; give a file that llmrl eval --output wrote"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error}); give a file that llmrl eval --output wrote") from error
    form = value.get("format") if isinstance(value, Mapping) else None
    if form != FORMAT:
        given = f"its format is {form!r}" if form else "it says no format"
        raise DataError(
            f"{path} is no result that this version reads ({given}); evaluate again with llmrl eval --output"
        )
    rows = value.get("per_row")
    if (
        not isinstance(rows, list)
        or not rows
        or not all(isinstance(r, Mapping) and r.get("correct") and "id" in r for r in rows)
    ):
        raise DataError(f"{path}: per_row must list problems with an id and a verdict (correct) a sample")
    twice = [id for id, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {len(twice)} ids stand more than once: {_some(twice)}")
    return dict(value)


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(why two results can't be compared, what a reader must know if they are), by their benchmarks, problems and manifests.

    They can't when the problems or what judges them differ. Templates, sampling and engine may: that can be what is compared.
    """
    objections, warnings = [], []
    if a.get("benchmark") != b.get("benchmark"):
        objections.append(f"the benchmarks differ: {a.get('benchmark')!r} and {b.get('benchmark')!r}")
    ours, theirs = (dict(_leaves(r.get("manifest") or {})) for r in (a, b))
    for key in dict.fromkeys([*ours, *theirs]):
        left, right = ours.get(key), theirs.get(key)
        if left == right or left is None or right is None:
            continue
        said = f"{key} is {_short(left)} in A and {_short(right)} in B"
        if key == "data.sha256":
            objections.append("the problems differ (data.sha256), perhaps another version of the data")
        elif key == "verifier.sha256":
            warnings.append(
                "the verifiers' source differs (verifier.sha256): score the older file's completions again with llmrl eval --predictions"
            )
        elif key.startswith("verifier."):
            objections.append(said)
        elif key == "chat_template_sha256" and ours.get("model.weights_sha256") == theirs.get("model.weights_sha256"):
            warnings.append("the chat templates differ, of the same weights")
        elif any(key == part or key.startswith(f"{part}.") for part in _SETTINGS):
            warnings.append(said)
    for name, known in (("A", ours), ("B", theirs)):
        unknown = [part for part in ("data.sha256", "verifier.function") if known.get(part) is None]
        unknown += [part for part in ("template", "sampling") if not _knows(known, part)]
        if unknown:
            warnings.append(f"{name} does not say its {', '.join(unknown)}, so that could not be compared")
    for name, result in (("A", a), ("B", b)):
        if missing := result.get("missing"):
            warnings.append(
                f"{len(missing)} problems of {name} have no completion and count as wrong: {_some(missing)}"
            )
    counts = [sorted({len(row["correct"]) for row in r["per_row"]}) for r in (a, b)]
    if counts[0] != counts[1]:
        warnings.append(f"samples a problem: {_range(counts[0])} in A and {_range(counts[1])} in B")
    return objections, warnings


def compare(
    a: Mapping[str, Any], b: Mapping[str, Any], *, files: Sequence[str] = ("A", "B"), force: bool = False
) -> Comparison:
    """Two results as `read_result` gives them: B against A, over the problems of both.

    Raises DataError for two that can't be compared (see `comparable`) or have different problems, unless `force`; and without any
    problem in common.
    """
    objections, warnings = comparable(a, b)
    rows_a, rows_b = ({row["id"]: row["correct"] for row in result["per_row"]} for result in (a, b))
    common = [id for id in rows_a if id in rows_b]
    only_a, only_b = [id for id in rows_a if id not in rows_b], [id for id in rows_b if id not in rows_a]
    if not common:
        raise DataError(f"{files[0]} and {files[1]} have no problem in common: {_some(only_a)} and {_some(only_b)}")
    for name, only in (("A", only_a), ("B", only_b)):
        if only:
            objections.append(f"{len(only)} problems are only in {name}, and are left out: {_some(only)}")
    if objections and not force:
        raise DataError(
            f"{files[0]} (A) and {files[1]} (B) can't be compared:\n- "
            + "\n- ".join(objections)
            + "\n--force compares them all the same"
        )
    counts = [[(sum(rows[id]), len(rows[id])) for id in common] for rows in (rows_a, rows_b)]
    (right_a, samples_a), (right_b, samples_b) = ([list(x) for x in zip(*c, strict=True)] for c in counts)
    scaled, _ = differences(right_a, samples_a, right_b, samples_b)
    p_value, exact = sign_flip_p_value(scaled)
    mean, low, high = difference_interval(right_a, samples_a, right_b, samples_b)
    flips = [Flip(id, x / n, y / k) for id, (x, n), (y, k), d in zip(common, *counts, scaled, strict=True) if d]
    flips.sort(key=lambda flip: -abs(flip.b - flip.a))
    return Comparison(
        benchmark=str(a.get("benchmark") or ""),
        problems=len(common),
        a=_side(files[0], a, right_a, samples_a),
        b=_side(files[1], b, right_b, samples_b),
        difference=mean,
        interval=(low, high),
        p_value=p_value,
        test=_test_name({*samples_a, *samples_b} == {1}, exact),
        won=[flip for flip in flips if flip.b > flip.a],
        lost=[flip for flip in flips if flip.b < flip.a],
        only_a=only_a,
        only_b=only_b,
        objections=objections,
        warnings=warnings,
    )


def _test_name(one_each: bool, exact: bool) -> str:
    return (
        "McNemar's exact test" if one_each else f"sign-flip permutation test, {'exact' if exact else '100,000 drawn'}"
    )


def _side(file: str, result: Mapping[str, Any], right: Sequence[int], samples: Sequence[int]) -> Side:
    accuracy, low, high = accuracy_interval(right, samples)
    name = ((result.get("manifest") or {}).get("model") or {}).get("name")
    return Side(file, str(name or Path(file).stem), min(samples), accuracy, (low, high))


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _knows(leaves: Mapping[str, Any], part: str) -> bool:
    return any(key.startswith(f"{part}.") and value not in (None, []) for key, value in leaves.items())


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _some(ids: Sequence[Any]) -> str:
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plot_comparison(comparison: Comparison, out: str | Path) -> Path:
    """Draws both accuracies, their difference and the changes a problem into a .svg, .png or .pdf file; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # without pyplot: no global state, no window system
    from matplotlib.figure import Figure

    c, path = comparison, Path(out)
    better, worse, plain = "#0072b2", "#d55e00", "#555555"
    figure = Figure(figsize=(8.4, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 1.6])
    axes = figure.add_subplot(grid[0, 0])
    for place, name, side in ((1, "A", c.a), (0, "B", c.b)):
        error = [[side.accuracy - side.interval[0]], [side.interval[1] - side.accuracy]]
        axes.errorbar(side.accuracy, place, xerr=error, fmt="o", color=plain, capsize=4)
        axes.annotate(
            f"{name}: {side.model[-40:]}  {side.accuracy:.3f}",
            (0.02, place + 0.22),
            xycoords=("axes fraction", "data"),
            fontsize=8,
        )
    axes.set_yticks([])
    axes.set_ylim(-0.5, 1.6)
    axes.set_title(f"accuracy, {c.problems} problems, 95% intervals", fontsize=10)
    axes = figure.add_subplot(grid[0, 1])
    color = plain if c.interval[0] <= 0 <= c.interval[1] else better if c.difference > 0 else worse
    axes.errorbar(
        c.difference,
        0,
        xerr=[[c.difference - c.interval[0]], [c.interval[1] - c.difference]],
        fmt="o",
        color=color,
        capsize=4,
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([])
    axes.set_title(f"B less A: {c.difference:+.3f}, p = {c.p_value:.3g}", fontsize=10)
    axes = figure.add_subplot(grid[1, :])
    changes = sorted([flip.b - flip.a for flip in [*c.won, *c.lost]], reverse=True)
    axes.bar(range(len(changes)), changes, width=1.0, color=[better if d > 0 else worse for d in changes])
    axes.axhline(0, color="black", linewidth=0.8)
    most = 1.1 * max(map(abs, changes), default=1.0)
    axes.set_ylim(-most, most)
    axes.set_xticks([])
    same = c.problems - len(changes)
    axes.set_title(f"{len(c.won)} problems better, {len(c.lost)} worse, {same} as before (not drawn)", fontsize=10)
    axes.set_ylabel("change of the share of right samples", fontsize=8)
    figure.suptitle(c.benchmark, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
