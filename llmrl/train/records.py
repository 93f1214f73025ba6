"""The files of a run directory: config.yaml, metrics.jsonl, samples/step_*.jsonl, evaluations/step_*/*.json, summary.json."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llmrl.train.files import fsync_path, write_atomically

_PACKAGES = ("llmrl", "torch", "transformers", "accelerate", "numpy")


class Records:
    """Writes the records of one run; one process does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metrics_file = directory / "metrics.jsonl"
        self.samples = directory / "samples"

    def rewind(self, step: int) -> None:
        """Drops what was recorded after `step`, and a last line that a kill cut, so that no step is recorded twice."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in read_metrics(self.metrics_file) if row["step"] <= step]
        write_atomically(self.metrics_file, "".join(lines))
        for file in self.samples.glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()
        for folder in (self.directory / "evaluations").glob("step_*"):
            if int(folder.name.removeprefix("step_")) > step:
                shutil.rmtree(folder)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends one line; what is not a finite number becomes null, which JSON can hold."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def add_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes `samples/step_<step>.jsonl`; values that JSON does not know are written as text."""
        self.samples.mkdir(exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
        # Half a surrogate pair has no UTF-8; as a backslash escape it is JSON.
        path = self.samples / f"step_{step:08d}.jsonl"
        path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")

    def flush(self) -> None:
        """To the disk: a checkpoint must not outlive the metrics that lead to it."""
        if self.metrics_file.exists():
            fsync_path(self.metrics_file)

    def write_config(self, text: str) -> None:
        write_atomically(self.directory / "config.yaml", text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomically(self.directory / "summary.json", json.dumps(summary, indent=1, default=str) + "\n")


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a record, up to the first line that is not whole: a kill may have cut it. None where there is no file."""
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not isinstance(row, dict):
                return
            yield row


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to the first one that is not whole or has no step."""
    for row in read_rows(file):
        if not isinstance(row.get("step"), int):
            return
        yield row


def metric_row(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of any kind (torch, numpy) as Python's, which JSON holds; text and integers stay what they are."""
    return {k: v if isinstance(v, str | int | None) else float(v) for k, v in metrics.items()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # llmrl itself, where it is run from its sources
        return "not installed"


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What the run ran on: versions, device, processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    versions = {p: _version(p) for p in _PACKAGES}
    return {
        "device": name,
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version(), **versions},
    }


def pick(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """The first of `names` that the row has a number for."""
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None
