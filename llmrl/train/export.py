"""A trained model out of a run: found, written whole or not at all, with its card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from llmrl.errors import ConfigError, LLMRLError
from llmrl.models.export import Exported, write_export
from llmrl.train.card import write_card
from llmrl.train.checkpoint import CheckpointStore, step_of, verify
from llmrl.train.files import publish


@dataclass(frozen=True)
class Trained:
    """A model, and where known the run and the step that it comes from."""

    model: str
    run: Path | None = None
    step: int | None = None


def find_model(source: str, checkpoint: str | None = None) -> Trained:
    """The model that a run's directory, a checkpoint, a model's directory or a hub id names.

    `checkpoint`, of a run: best, latest or a step; None: the final model. Raises ConfigError where it is not there, or not whole.
    """
    path = Path(source).expanduser()
    if is_run(path):
        return _final(path) if checkpoint is None else _checkpoint(_chosen(path, checkpoint))
    if checkpoint is not None:
        raise ConfigError(f"--checkpoint chooses one of a run, and {source} is no run's directory; leave it out")
    if (path / "state.json").is_file():
        return _checkpoint(path)
    parent = path.resolve().parent
    if path.is_dir() and path.resolve().name == "model":
        if is_run(parent):
            return _final(parent)
        if (parent / "state.json").is_file():
            return _checkpoint(parent)
    return Trained(source)


def is_run(path: Path) -> bool:
    """Whether a trainer wrote this directory."""
    return (path / "config.yaml").is_file() and (path / "summary.json").is_file()


def export_model(
    trained: Trained,
    output: Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    name: str | None = None,
) -> Exported:
    """Writes the model with its card into the new directory `output`, which appears when everything is in it.

    See `write_export`; `name` is what the card calls the model (default: the directory's). Raises ConfigError also when `output` holds something, LLMRLError when the disk does not take it.
    """
    check_output(output)
    temporary = output.parent / f".tmp_{output.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # a kill may have left one
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        exported = write_export(trained.model, temporary, merge=merge, dtype=dtype, max_shard_size=max_shard_size)
        write_card(
            temporary,
            name=name or output.name,
            run=trained.run,
            step=trained.step,
            source=trained.model,
            model=exported,
        )
        publish(temporary, output)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise LLMRLError(
            f"the model could not be written to {output}: {error}. Make room, or choose another output"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return exported


def check_output(output: Path) -> None:
    """Raises ConfigError unless a new directory can be made there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not an empty directory; choose another output")


def _final(run: Path) -> Trained:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if not (run / "model").is_dir():
        raise ConfigError(
            f"{run} has no final model: the run is at step {summary['step']} of {summary['total_steps']} ({summary['status']}). "
            "Give `--checkpoint latest`, or let the run end"
        )
    # A finished run that was given more steps keeps its old model until the end of those.
    return Trained(str(run / "model"), run, summary["step"] if summary["status"] == "finished" else None)


def _chosen(run: Path, which: str) -> Path:
    store = CheckpointStore(run / "checkpoints", keep=None)
    steps = [str(step_of(path)) for path in store.all()]
    there = f"it has those of steps {', '.join(steps)}" if steps else "it has none"
    if which == "latest":
        found = store.newest()
        if found is None:
            raise ConfigError(f"{run} has no whole checkpoint; {there}")
    elif which == "best":
        found = store.best()
        if found is None:
            raise ConfigError(f"{run} has no best checkpoint: its recipe has no metric_for_best_model; {there}")
    elif not which.isdecimal():
        raise ConfigError(f"--checkpoint {which} is neither best, latest nor a step")
    else:
        found = store.path(int(which))
        if not found.is_dir():
            raise ConfigError(f"{run} has no checkpoint of step {which}; {there}")
    return found


def _checkpoint(path: Path) -> Trained:
    path = path.resolve()
    if problem := verify(path):
        raise ConfigError(f"{path} is not a whole checkpoint: {problem}; choose another one")
    run = path.parent.parent
    step = json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]
    return Trained(str(path / "model"), run if is_run(run) else None, step)
