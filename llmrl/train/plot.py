"""A picture of a run's curves, from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrl.errors import DataError
from llmrl.train.records import read_metrics

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss", "eval_loss")),
    ("reward", ("reward", "eval_reward")),
    ("accuracy", ("accuracy", "rewards/accuracies", "eval_accuracy")),
    ("margin of the scores", ("margin", "eval_margin")),
    ("margin of the implicit rewards", ("rewards/margins", "eval_rewards/margins")),
    ("implicit rewards", ("rewards/chosen", "rewards/rejected", "eval_rewards/chosen", "eval_rewards/rejected")),
    ("log-prob of an answer (nats)", ("logps/chosen", "logps/rejected", "eval_logps/chosen", "eval_logps/rejected")),
    ("mean score", ("mean_reward", "eval_mean_reward")),
    ("calibration error", ("eval_calibration_error",)),
    ("completion length (tokens)", ("completions/mean_length", "eval_completions/mean_length")),
    ("KL (nats a token)", ("kl",)),
    ("weight of the KL", ("beta",)),
    ("explained variance of the critic", ("value/explained_variance",)),
    ("entropy (nats)", ("entropy",)),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
)


def plot_curves(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Draws what the run recorded, a panel a quantity, into `<run_dir>/curves.png` (or `out`); returns the path.

    Raises DataError when there is nothing to draw.
    """
    # Figure without pyplot: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directory = Path(run_dir)
    rows = list(read_metrics(directory / "metrics.jsonl"))
    panels = [(title, [n for n in names if any(_is_number(r.get(n)) for r in rows)]) for title, names in PANELS]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        raise DataError(f"{directory / 'metrics.jsonl'} has no curve to draw; the run recorded no step")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, names) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        for name in names:
            points = [(r["step"], r[name]) for r in rows if _is_number(r.get(name))]
            _curve(axes, points, name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
    path = Path(out) if out is not None else directory / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with up to `window - 1` before it."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def _curve(axes: Any, points: Sequence[tuple[int, float]], name: str) -> None:
    steps, values = [p[0] for p in points], [p[1] for p in points]
    marker = "o" if len(points) < 20 else None
    if len(points) < 60 or name == "learning_rate":
        axes.plot(steps, values, label=name, marker=marker, markersize=3)
        return
    (faint,) = axes.plot(steps, values, alpha=0.25)
    axes.plot(steps, running_mean(values, len(points) // 30), label=name, color=faint.get_color())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
