"""TensorBoard, Weights & Biases and Trackio through accelerate's trackers, beside the run directory's own files."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from llmrl.errors import ConfigError
from llmrl.train.resume import flatten


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is not installed; accelerate would leave it out without a word."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"report_to names {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}, or leave it out. "
            "metrics.jsonl in output_dir has every number in any case"
        )


class Trackers:
    """The trackers of one run; without any, every call does nothing."""

    def __init__(
        self, accelerator: Accelerator, names: Sequence[str], run_name: str, recipe: Mapping[str, Any]
    ) -> None:
        self._accelerator = accelerator
        self._active = bool(names)
        if self._active:
            flat = {
                key: value if isinstance(value, int | float | str) else str(value)
                for key, value in flatten(recipe).items()
            }
            named = {name: {"name": run_name} for name in names if name in ("wandb", "trackio")}
            accelerator.init_trackers("llmrl", config=flat, init_kwargs=named)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._active:
            numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
            self._accelerator.log(numbers, step=step)

    def finish(self) -> None:
        """Not `end_training`, which would take the process group down with the trackers."""
        for tracker in self._accelerator.trackers if self._active else ():
            tracker.finish()
        self._active = False
