"""`llmrl eval --model M --data FILE --n 4 [--output R.json] [key=value ...]`: accuracy of a model, by the same scorers as training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from llmrl.cli.recipe import print_keys, split_config, wants_help
from llmrl.config.evaluation import EvalConfig
from llmrl.config.load import load_recipe
from llmrl.errors import ConfigError

if TYPE_CHECKING:
    from llmrl.evaluation.runner import EvalResult

_FLAGS = {
    "--model": "model_name_or_path",
    "-m": "model_name_or_path",
    "--data": "data",
    "-d": "data",
    "--n": "n",
    "-n": "n",
    "--output": "output",
    "-o": "output",
}
_USAGE = """usage: llmrl eval --model M --data FILE --n 4 [--output R.json] [--config RECIPE] [key=value ...]

  llmrl eval --model runs/sft/model --data problems.jsonl --n 4 temperature=0.7 data.0.columns.prompt=question

--model, --data, --n and --output stand for model_name_or_path=, data=, n= and output=.
"""


def run(argv: Sequence[str]) -> int:
    """Evaluates, prints a table, and writes the results where `output` says. What is wrong with the arguments is said at once."""
    if wants_help(argv):
        print(_USAGE)
        print_keys("eval")
        return 0
    path, rest = split_config(argv)
    config = load_recipe("eval", path, _as_overrides(rest))
    if config.output:
        _check_output(Path(config.output))
    result = evaluate_model(config, progress=True)
    print_result(result, config)
    if config.output:
        print(f"results: {result.save(config.output)}")
    return 0


def _check_output(path: Path) -> None:
    """A long evaluation must not end in a file that can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {path.parent} can't be made ({error}); give the path of a new file") from error
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"output: {path} can't be written; give the path of a file, such as results.json")


def _as_overrides(argv: Sequence[str]) -> list[str]:
    """Flags come before the dotted overrides, which may change a part of what a flag has set."""
    flags, overrides = [], []
    args = iter(argv)
    for arg in args:
        name, equals, value = arg.partition("=")
        if name not in _FLAGS:
            overrides.append(arg)
            continue
        given = value if equals else next(args, None)
        if given is None or given == "":
            raise ConfigError(f"{name} needs a value, such as {name} {'4' if _FLAGS[name] == 'n' else 'PATH'}")
        # A path is quoted, because an override of `data` is YAML, which would read some file names as something else.
        flags.append(f"{_FLAGS[name]}={json.dumps(given) if _FLAGS[name] == 'data' else given}")
    return flags + overrides


def evaluate_model(config: EvalConfig, *, progress: bool = False) -> EvalResult:
    """Loads model, problems and scorer, and evaluates; every problem counts, also one whose prompt had to be cut."""
    from llmrl.evaluation.judges import LocalJudges
    from llmrl.data.build import prompts_from_rows
    from llmrl.data.sources import load_rows
    from llmrl.evaluation.runner import evaluate
    from llmrl.rewards.runner import RewardRunner
    from llmrl.train.launch import local_device

    rows = load_rows(config.data, seed=0)  # the same problems whatever the sampling seed
    allowed = config.allow_code_execution
    device = local_device()
    with RewardRunner(
        [config.scorer],
        on_error="skip",
        workers=2,
        device=device,
        allow_code_execution=allowed,
        make_judge=LocalJudges(device),
    ) as scorer:
        tokenizer, engine = _engine(config)
        prompts, report = prompts_from_rows(
            rows,
            tokenizer,
            system_prompt=config.system_prompt,
            max_prompt_length=config.max_prompt_length,
            on_overlong="truncate",
        )
        bad = scorer.check_golds(prompts)
        settings = {
            "model": config.model_name_or_path,
            "data": [source.path for source in config.data],
            "config": config.model_dump(mode="json"),
            "truncated_prompts": report.truncated,
            "notes": list(report.notes),
            "unusable_answers": [{"id": b.prompt_id, "reason": b.reason} for b in bad],
        }
        return evaluate(
            prompts,
            engine,
            scorer,
            n=config.n,
            sampling=_sampling(config),
            threshold=config.threshold,
            batch_size=config.batch_size,
            manifest=settings,
            progress=progress,
        )


def _sampling(config: EvalConfig) -> Any:
    from llmrl.types import Sampling

    return Sampling(
        max_tokens=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        seed=config.seed,
    )


def _engine(config: EvalConfig) -> tuple[Any, Any]:
    import torch

    from llmrl.models.load import load_policy, stop_token_ids
    from llmrl.rollout.local import LocalEngine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_policy(config, device=device)
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    engine = LocalEngine(
        model,
        tokenizer,
        stop_token_ids=stop_token_ids(model, tokenizer),
        max_batch_tokens=config.rollout.max_batch_tokens,
        autocast=(lambda: torch.autocast(device.type, dtype=mixed)) if mixed else nullcontext,
    )
    return tokenizer, engine


def print_result(result: EvalResult, config: EvalConfig) -> None:
    """The numbers as a table, and what a reader must know about them below it."""
    low, high = result.interval
    table = Table(title=f"{config.model_name_or_path} on {', '.join(s.path for s in config.data)}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("problems x completions", f"{len(result.rows)} x {result.samples}")
    table.add_row("temperature", f"{config.temperature:g}{'' if config.temperature else ' (greedy)'}")
    table.add_row("accuracy", f"{result.accuracy:.4f}")
    table.add_row("95% interval", f"{low:.4f} to {high:.4f}")
    for k, value in result.pass_at_k.items():
        if k > 1:
            table.add_row(f"pass@{k}", f"{value:.4f}")
    if result.reward_interval is not None and any(r not in (0, 1, None) for row in result.rows for r in row["rewards"]):
        table.add_row("mean score", f"{result.mean_reward:.4f}")
        table.add_row("95% interval", "{:.4f} to {:.4f}".format(*result.reward_interval))
    table.add_row("mean length (tokens)", f"{result.mean_length:.1f}")
    table.add_row("cut by the token limit", f"{result.truncation_rate:.1%}")
    console = Console()
    console.print(table)
    for note in result.manifest.get("notes", ()):
        console.print(f"note: {note}", markup=False)
    if result.failures:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(result.failures.items()))
        console.print(f"Without a score, counted as wrong: {listed}")
    if unusable := result.manifest.get("unusable_answers"):
        ids = ", ".join(item["id"] for item in unusable[:5])
        console.print(
            f"Problems whose reference answer the scorer can't use, counted as wrong: {len(unusable)} ({ids})"
        )
    if cut := result.manifest.get("truncated_prompts"):
        console.print(f"Prompts cut at max_prompt_length {config.max_prompt_length}: {cut}")
