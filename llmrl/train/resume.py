"""Where a run starts: from nothing, or from a checkpoint that this recipe may continue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrl.errors import ConfigError
from llmrl.train.checkpoint import CheckpointStore, verify

# Keys that change how long a run is, what it reports or how fast it is, not what a step computes (but for rounding).
HARMLESS = frozenset(
    {
        "output_dir", "max_steps", "num_train_epochs", "save_steps", "save_total_limit", "resume", "sigterm_exit_code",
        "report_to", "run_name", "num_samples_logged", "num_processes", "max_nonfinite_steps", "max_logprob_gap",
        "tokens_per_microbatch", "gradient_checkpointing", "reward_workers", "on_error",
        "reference_cache", "reference_logprobs",
        "metric_for_best_model", "greater_is_better", "benchmark_dir", "collective_timeout",
    }
)  # fmt: skip
_HARMLESS_PREFIXES = ("eval_", "rollout.", "benchmarks")
# These take rows away from training, or change what is sampled.
_NOT_HARMLESS = ("eval_dataset", "eval_fraction", "rollout.engine", "rollout.max_staleness")


def find_start(config: Any, kind: str, store: CheckpointStore) -> Path | None:
    """The checkpoint to continue from, None to begin. Raises ConfigError when going on would mix two runs or destroy one."""
    directory = Path(config.output_dir)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output_dir: {directory} is a file; choose a directory, new or of an earlier run")
    if _same(Path(config.model_name_or_path), directory / "model"):
        raise ConfigError(
            f"model_name_or_path is {config.model_name_or_path}, where this run would write its own model. "
            "Choose another output_dir"
        )
    if config.resume == "auto":
        start = store.newest()
        if start is None and store.all():
            problems = "; ".join(f"{p.name}: {verify(p)}" for p in store.all())
            raise ConfigError(
                f"no checkpoint in {store.root} is whole ({problems}), so the run can't be continued. "
                "Choose another output_dir, or remove them to start over"
            )
    elif config.resume == "never":
        _refuse_used(directory, store)
        start = None
    else:
        start = Path(config.resume)
        if problem := verify(start):
            raise ConfigError(
                f"resume is {config.resume}, which is not a whole checkpoint: {problem}. Give a directory like "
                "<output_dir>/checkpoints/step_00000100, or auto"
            )
        if not _same(start.parent, store.root):
            _refuse_used(directory, store)
    if start is not None:
        check_recipe(json.loads((start / "state.json").read_text(encoding="utf-8")), config, kind, start)
    return start


def check_recipe(state: Mapping[str, Any], config: Any, kind: str, start: Path) -> None:
    """Raises ConfigError, listing the keys, when the checkpoint's recipe computes other steps than this one."""
    advice = "Go back to those values, or choose another output_dir"
    if state["kind"] != kind:
        raise ConfigError(f"{start} is of a {state['kind']} run, this is a {kind} run. {advice}")
    ours = _with_entries(flatten(config.model_dump(mode="json")))
    theirs = _with_entries(flatten(state["recipe"]))
    # A key that the checkpoint does not have came with a newer version, whose default is the old behaviour.
    differ = [
        f"{key}: {_show(theirs[key])} -> {_show(ours.get(key))}"
        for key in sorted(theirs)
        if theirs[key] != ours.get(key) and not _harmless(key)
    ]
    if differ:
        raise ConfigError(
            "\n  ".join([f"{start} was made by another recipe, so it is not continued:", *differ, advice])
        )


def longer_schedule(state: Mapping[str, Any], config: Any, total_steps: int) -> str:
    """A note when the number of steps changed under a schedule that depends on it, else ""."""
    if state["total_steps"] == total_steps:
        return ""
    by_ratio = config.warmup_steps is None and config.warmup_ratio > 0
    if config.lr_scheduler_type == "constant" and not by_ratio:
        return ""
    return (
        f"the run had {state['total_steps']} steps and now has {total_steps}: the {config.lr_scheduler_type} schedule is that "
        f"of {total_steps} from here on, so the learning rate may jump"
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted key -> value; lists are values."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _with_entries(flat: Mapping[str, Any]) -> dict[str, Any]:
    """With the keys of each entry of a list of mappings in the list's place: `rewards.0.weight`; their values stay whole."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            out[key] = f"{len(value)} of them"
            out |= {f"{key}.{i}.{name}": part for i, entry in enumerate(value) for name, part in entry.items()}
        else:
            out[key] = value
    return out


def _harmless(key: str) -> bool:
    return key in HARMLESS or (key.startswith(_HARMLESS_PREFIXES) and not key.startswith(_NOT_HARMLESS))


def _refuse_used(directory: Path, store: CheckpointStore) -> None:
    used = [name for name in ("metrics.jsonl", "model", "samples") if (directory / name).exists()]
    if store.all() or used:
        found = ", ".join([*used, *(["checkpoints"] if store.all() else [])])
        raise ConfigError(
            f"output_dir {directory} already holds a run ({found}), which would be overwritten. Choose another output_dir, "
            "or set resume: auto to continue it"
        )


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
