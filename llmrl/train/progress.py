"""What a person sees while a run goes on: one live line and a table of samples, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress as Bar
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmrl.train.records import pick

_SHOWN = (
    ("loss", ("loss",), "{:.4f}"),
    ("reward", ("reward",), "{:.3f}"),
    ("length", ("completions/mean_length",), "{:.0f}"),
    ("kl", ("kl",), "{:.4f}"),
    ("eval loss", ("eval_loss",), "{:.4f}"),
    ("accuracy", ("eval_accuracy",), "{:.3f}"),
    ("tok/s", ("tokens_per_second",), "{:,.0f}"),
)
_LINES = 20  # about this many lines of a whole run, where lines are all there is


class Progress:
    """The display of one process; on processes other than the main one (`shown=False`) it is silent.

    `step`, `samples` and `message` update it; the terminal is written to only from these calls, never from a thread.
    """

    def __init__(
        self, kind: str, total_steps: int, *, shown: bool = True, num_samples: int = 4, console: Console | None = None
    ) -> None:
        self.kind, self.total_steps, self.shown, self.num_samples = kind, total_steps, shown, num_samples
        self.console = console or Console()
        self._live: Live | None = None
        self._times: deque[float] = deque(maxlen=21)  # the last 20 steps tell how long the next ones take
        self._last: dict[str, float] = {}
        self._step = 0
        self._table: Table | None = None

    def start(self, step: int) -> None:
        self._step = step
        self._times.append(time.monotonic())
        if self.shown and self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, auto_refresh=False)
            self._live.start(refresh=True)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the numbers of a step that has ended."""
        first, self._step = not self._last, step
        self._times.append(time.monotonic())
        for label, names, _ in _SHOWN:
            if (value := pick(metrics, names)) is not None:
                self._last[label] = value
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
        elif self.shown and (first or step == self.total_steps or step % max(1, self.total_steps // _LINES) == 0):
            self.console.print(Text(f"{self.kind} {self._counts()}  {self._numbers()}"), soft_wrap=True)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Shows the first rows of `samples/step_*.jsonl`; without a terminal, only the last ones, at the end."""
        if not self.shown or not rows or not self.num_samples:
            return
        self._table = samples_table(step, rows[: self.num_samples])
        if self._live is not None:
            self._live.update(self._render(), refresh=True)

    def message(self, text: str) -> None:
        """One line above the display."""
        if self.shown:
            self.console.print(Text(f"{self.kind}: {text}"), soft_wrap=True)

    @contextmanager
    def pass_over(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        """A bar for a pass over the data before the first step; call what it gives with the number of items done.

        At its end, and where there is no terminal, a line says how long it took.
        """
        began = time.monotonic()
        with Bar(console=self.console, disable=not (self.shown and self.console.is_terminal), transient=True) as bar:
            task = bar.add_task(f"{self.kind}: {what}", total=total)
            yield lambda n: bar.advance(task, n)
        self.message(f"{what}: {total:,} in {duration(time.monotonic() - began)}")

    def stop(self) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.stop()
            self._live = None
        elif self.shown and self._table is not None:
            self.console.print(self._table)
        self._table = None

    def _render(self) -> Group:
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.total_steps, completed=self._step, width=24)
        line.add_row(Text(self.kind, style="bold"), bar, Text(self._counts()), Text(self._numbers(), style="cyan"))
        return Group(*([self._table] if self._table is not None else []), line)

    def _counts(self) -> str:
        return f"step {self._step}/{self.total_steps}"

    def _numbers(self) -> str:
        parts = [f"{label} {form.format(self._last[label])}" for label, _, form in _SHOWN if label in self._last]
        if len(self._times) > 1 and self._step < self.total_steps:
            mean = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
            parts.append(f"eta {duration(mean * (self.total_steps - self._step))}")
        return "  ".join(parts)


def samples_table(step: int, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Prompt, completion, reward with its parts (value or outcome, time, note) and advantage of some samples, to be read at a glance."""
    table = Table(title=f"samples of step {step}", title_justify="left", expand=True, show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    table.add_column("reward", justify="right", no_wrap=True)
    parts = any(row.get("parts") for row in rows)
    if parts:
        table.add_column("parts", ratio=2)
    table.add_column("advantage", justify="right", no_wrap=True)
    for row in rows:
        ending = " [cut]" if row.get("finish_reason") == "length" else ""
        table.add_row(
            Text(clip(_prompt_text(row.get("prompt")), 120)),
            Text(clip(str(row.get("completion", "")), 240) + ending),
            Text(_number(row.get("reward"))),
            *([Text("\n".join(_part(row, name) for name in row.get("parts") or {}))] if parts else []),
            Text(_number(row.get("advantage"))),
        )
    return table


def _part(row: Mapping[str, Any], name: str) -> str:
    """ "math_answer 0.00, 1.2 ms: read 13, the reference is 12"; instead of a value that is not there, the outcome."""
    value, outcome = row["parts"][name], (row.get("outcomes") or {}).get(name, "score")
    shown = f"{name} {_number(value) if outcome == 'score' else outcome}"
    milliseconds, note = (row.get("milliseconds") or {}).get(name), (row.get("notes") or {}).get(name)
    shown += f", {milliseconds:.3g} ms" if milliseconds is not None else ""
    return f"{shown}: {clip(note, 100)}" if note else shown


def clip(text: str, width: int) -> str:
    """One line of at most `width` characters, the middle left out: a prompt's start and an answer's end tell the most.

    Control characters are replaced, since a model's output must not steer the terminal.
    """
    line = "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in text)
    if len(line) <= width:
        return line
    head = (width - 3) // 2
    return f"{line[:head]} … {line[len(line) - (width - 3 - head) :]}"


def duration(seconds: float) -> str:
    """3:05, or 2:03:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.2f}"


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, list):
        return " ".join(str(message.get("content", "")) for message in prompt)
    return str(prompt or "")
