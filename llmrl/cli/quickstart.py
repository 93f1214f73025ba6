"""`llmrl quickstart --seed N`: data, a small model, SFT, evaluation, GRPO, evaluation; nothing is fetched.

The task is in `llmrl.data.addition`, the two recipes are quickstart-sft and quickstart-grpo.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from llmrl.config.load import load_recipe
from llmrl.data.addition import write_files
from llmrl.errors import ConfigError

if TYPE_CHECKING:
    from llmrl.evaluation.result import EvalResult

_MARK = ".llmrl-quickstart"
# 259 tokens are the bytes and three special ones: one token a character. The sizes give 0.6 million parameters. With the usual
# initial scale (0.02, tied) so small a model learns the task three times slower.
_MODEL: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 128,
    "num_layers": 3,
    "num_heads": 4,
    "intermediate_size": 352,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_MODES = {"greedy": 0.0, "sampled": 1.0}


def run(argv: Sequence[str]) -> int:
    """Runs the whole road in `--output-dir`, afresh every time, and writes summary.json there."""
    parser = argparse.ArgumentParser(prog="llmrl quickstart", description="Model, SFT, GRPO and evaluation in one go.")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights, order and sampling")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quickstart"))
    args = parser.parse_args(argv)
    started = time.monotonic()
    folder = _fresh(args.output_dir)
    console = Console()
    summary = quickstart(folder, args.seed, console)
    summary["seconds"] = round(time.monotonic() - started, 1)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _print(summary, folder, console)
    return 0


def quickstart(folder: Path, seed: int, console: Console) -> dict[str, Any]:
    """All stages; returns what summary.json holds, but for the time."""
    import torch

    from llmrl.algorithms.grpo import GRPOTrainer
    from llmrl.algorithms.sft import SFTTrainer
    from llmrl.models.init import init_model

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on a model this small, a second thread costs more than it brings
    console.rule("1. data and a model with random weights")
    data = write_files(folder / "data", seed)
    init_model(folder / "init", train_files=[data["demonstrations"]], seed=seed, **_MODEL)

    console.rule("2. supervised fine-tuning on demonstrations that mostly forget the carry")
    stage = {"output_dir": folder / "sft", "seed": seed}
    sft = _recipe("sft", model_name_or_path=folder / "init", dataset=data["demonstrations"], **stage)
    SFTTrainer(sft).train()
    before = _evaluate(folder / "sft" / "model", data["held_out"], folder / "before", seed)

    console.rule("3. GRPO: the reward is whether the sum is right")
    stage = {"output_dir": folder / "grpo", "seed": seed}
    files = {"dataset": data["prompts"], "eval_dataset": data["held_out"]}
    GRPOTrainer(_recipe("grpo", model_name_or_path=folder / "sft" / "model", **files, **stage)).train()
    after = _evaluate(folder / "grpo" / "model", data["held_out"], folder / "after", seed)

    summary: dict[str, Any] = {"seed": seed, "problems": len(before["greedy"].rows)}
    for when, results in (("before", before), ("after", after)):
        for mode, result in results.items():
            name = f"{'accuracy' if mode == 'greedy' else mode}_{when}"
            summary[name] = result.accuracy
            summary[f"{name}_interval"] = list(result.interval)
    return summary


def _recipe(kind: str, **changes: Any) -> Any:
    """The shipped recipe with this run's paths and seed."""
    return load_recipe(kind, f"quickstart-{kind}", [f"{key}={json.dumps(_plain(v))}" for key, v in changes.items()])


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _evaluate(model: Path, data: Path, out: Path, seed: int) -> dict[str, EvalResult]:
    """Greedy and sampled accuracy on the held-out problems, with the reward of the training as the scorer."""
    from llmrl.config.data import DatasetSource
    from llmrl.config.evaluation import EvalConfig
    from llmrl.config.reward import RewardSpec
    from llmrl.evaluation.run import run_evaluation

    results = {}
    for mode, temperature in _MODES.items():
        config = EvalConfig(
            model_name_or_path=str(model),
            data=[DatasetSource(path=str(data))],
            scorer=RewardSpec(function="exact_match"),
            temperature=temperature,
            seed=seed,
            max_completion_length=48,
            batch_size=400,
        )
        (results[mode],) = run_evaluation(config)
        results[mode].save(out / f"{mode}.json")
    return results


def _fresh(folder: Path) -> Path:
    """An empty directory; an earlier quickstart's is emptied, anything else that is there is left alone."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise ConfigError(f"{folder} is not empty and not from an earlier quickstart; give another --output-dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()
    return folder


def _print(summary: dict[str, Any], folder: Path, console: Console) -> None:
    table = Table(title=f"Accuracy on {summary['problems']} held-out sums (95% interval), seed {summary['seed']}")
    for column in ("", "after SFT", "after GRPO"):
        table.add_column(column, justify="right" if column else "left")
    for title, name in (("greedy", "accuracy"), ("sampled (T = 1)", "sampled")):
        cells = []
        for when in ("before", "after"):
            low, high = summary[f"{name}_{when}_interval"]
            cells.append(f"{summary[f'{name}_{when}']:.3f} ({low:.3f} to {high:.3f})")
        table.add_row(title, *cells)
    console.print(table)
    console.print(f"curves:      {folder / 'grpo' / 'curves.png'}", soft_wrap=True)
    console.print(f"completions: {folder / 'grpo' / 'samples'}", soft_wrap=True)
    console.print(f"summary:     {folder / 'summary.json'} ({summary['seconds']:.0f} seconds)", soft_wrap=True)
