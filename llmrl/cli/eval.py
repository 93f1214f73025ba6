"""`llmrl eval --model M --benchmark math500,aime24 [--output DIR] [key=value ...]`: how often a model is right, by the scorers of training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from llmrl.cli import how_many, launch
from llmrl.cli.recipe import print_keys, split_config, wants_help
from llmrl.config.evaluation import EvalConfig
from llmrl.config.load import load_recipe
from llmrl.errors import ConfigError

if TYPE_CHECKING:
    from llmrl.evaluation.result import EvalResult

_FLAGS = {
    "--model": "model_name_or_path",
    "-m": "model_name_or_path",
    "--benchmark": "benchmark",
    "-b": "benchmark",
    "--data": "data",
    "-d": "data",
    "--data-dir": "data_dir",
    "--template": "template",
    "--predictions": "predictions",
    "--n": "n",
    "-n": "n",
    "--output": "output",
    "-o": "output",
}
_WIDTH = 110
"""Characters that the table may need; a narrow terminal wraps its lines rather than losing digits."""
_SWITCHES = {"--allow-missing": "allow_missing", "--overwrite": "overwrite"}
_USAGE = """usage: llmrl eval --model M --benchmark NAME[,NAME ...] [--data-dir DIR] [--template T] [--n K] [--output FILE|DIR] [key=value ...]
       llmrl eval --model M --data FILE [--n K] [--output FILE|DIR] [key=value ...]
       llmrl eval --benchmark NAME --predictions FILE [--data-dir DIR | --data FILE] [--allow-missing] --output FILE
       llmrl eval --how-many MARGIN --benchmark NAME [--accuracy P] [--result FILE]    how many samples a 95% interval of +- MARGIN needs

  llmrl eval --model runs/grpo/model --benchmark math500,aime24 --output results
  llmrl eval --model Qwen/Qwen2.5-1.5B --benchmark gsm8k --template plain --n 1 temperature=0
  llmrl eval --model M --benchmark math500 rollout.engine=vllm_server 'rollout.urls=[http://127.0.0.1:8000]'
  llmrl eval --model runs/sft/model --data problems.jsonl --n 4 temperature=0.7 data.0.columns.prompt=question

With --output every sample is written down as it finishes: the same command goes on from there after a kill. --overwrite throws away what
another evaluation left under that name. Flags stand for keys: --model for model_name_or_path=, --data-dir for data_dir=, ...
"""


def run(argv: Sequence[str]) -> int:
    """Evaluates, prints a table, and writes the results where `output` says. What is wrong with the arguments is said at once."""
    if how_many.asked_for(argv):
        return how_many.run(argv)
    if wants_help(argv):
        from llmrl.evaluation.benchmarks import shipped

        print(_USAGE)
        print(f"Benchmarks that come with llmrl: {', '.join(shipped())}\n")
        print_keys("eval")
        return 0
    if launch.asked_for(argv) or ("LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1"):
        raise ConfigError(
            "llmrl eval runs in one process: start it without a launcher. On several GPUs, let it sample from generation servers: "
            "llmrl serve, then rollout.engine=vllm_server 'rollout.urls=[...]'"
        )
    path, rest = split_config(argv)
    config = load_recipe("eval", path, _as_overrides(rest))
    console = Console()
    results = evaluate_model(config, console=console)
    print_results(results, console)
    for result in results:
        if result.path is not None:
            console.print(f"{result.benchmark}: {result.path}", markup=False, soft_wrap=True)
    return 0


def _as_overrides(argv: Sequence[str]) -> list[str]:
    """Flags come before the dotted overrides, which may change a part of what a flag has set."""
    flags, overrides = [], []
    args = iter(argv)
    for arg in args:
        name, equals, value = arg.partition("=")
        if arg in _SWITCHES:
            flags.append(f"{_SWITCHES[arg]}=true")
            continue
        if name not in _FLAGS:
            overrides.append(arg)
            continue
        given = value if equals else next(args, None)
        if given is None or given == "":
            raise ConfigError(f"{name} needs a value, such as {name} {'4' if _FLAGS[name] == 'n' else 'PATH'}")
        # A path is quoted, because an override of `data` is YAML, which would read some file names as something else.
        quoted = _FLAGS[name] in ("data", "benchmark")
        flags.append(f"{_FLAGS[name]}={json.dumps(given) if quoted else given}")
    return flags + overrides


def evaluate_model(config: EvalConfig, *, console: Console | None = None) -> list[EvalResult]:
    """A result a benchmark (one, for `data`); `console` is where progress and notes go."""
    from llmrl.evaluation.run import run_evaluation

    say: Any = (lambda text: None) if console is None else (lambda text: console.print(f"note: {text}", markup=False))
    return run_evaluation(config, progress=console is not None, say=say)


def print_results(results: Sequence[EvalResult], console: Console) -> None:
    """A line a benchmark, and what a reader must know about it below."""
    columns = {
        "benchmark": lambda r: r.benchmark,
        "problems": lambda r: f"{len(r.rows)} x {r.samples}",
        "accuracy": lambda r: f"{r.accuracy:.4f}",
        "95% interval": lambda r: "{:.3f} to {:.3f}".format(*r.interval),
        "pass@k": lambda r: _by_k(r.pass_at_k),
        "maj@k": lambda r: _by_k(r.maj_at_k),
        "format": lambda r: _share(r.format_rate),
        "truncated": lambda r: _share(r.truncation_rate),
        "tokens": lambda r: "" if r.mean_length is None else f"{r.mean_length:.0f}",
    }
    cells = {title: [text(result) for result in results] for title, text in columns.items()}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = {title: column for title, column in cells.items() if any(column)}
    for title in shown:
        table.add_column(title, justify="left" if title == "benchmark" else "right", no_wrap=True)
    for row in zip(*shown.values()):
        table.add_row(*row)
    Console(width=max(_WIDTH, console.width)).print(table)
    for result in results:
        for line in _remarks(result):
            console.print(f"{result.benchmark}: {line}", markup=False, soft_wrap=True)


def _by_k(values: dict[int, float] | None) -> str:
    """The value at the largest k, where that is not 1."""
    k = max(values or {1: 0.0})
    return f"{values[k]:.3f} @{k}" if values and k > 1 else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _remarks(result: EvalResult) -> list[str]:
    lines = []
    sampling = result.manifest.get("sampling", {})
    if "temperature" in sampling:
        temperature = sampling["temperature"]
        lines.append(f"temperature {temperature:g}{'' if temperature else ' (greedy)'}, seed {result.manifest['seed']}")
    if result.reward_interval is not None and any(r not in (0, 1, None) for row in result.rows for r in row["rewards"]):
        low, high = result.reward_interval
        lines.append(f"mean score {result.mean_reward:.4f}, 95% interval {low:.4f} to {high:.4f}")
    for name in ("acc", "acc_norm"):
        if name in result.extra:
            found = result.extra[name]
            lines.append(f"{name} {found['accuracy']:.4f}, 95% interval {found['low']:.4f} to {found['high']:.4f}")
    for name, found in result.also.items():
        interval = "" if found["interval"] is None else ", 95% interval {:.4f} to {:.4f}".format(*found["interval"])
        lines.append(f"{name} {found['value']:.4f}{interval}")
    if elsewhere := result.extra.get("other_split"):
        lines.append(f"completions of problems of another split, left out: {len(elsewhere)}")
    failures = {reason: count for reason, count in sorted(result.failures.items()) if reason != "missing"}
    if failures:
        listed = ", ".join(f"{count} {reason}" for reason, count in failures.items())
        lines.append(f"without a score, counted as wrong: {listed}")
    if missing := result.failures.get("missing"):
        lines.append(
            f"completions that are missing, counted as wrong: {missing}; {len(result.missing)} problems have none"
        )
    return lines
