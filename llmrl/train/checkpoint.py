"""Checkpoints that are complete or absent: a kill at any moment of a save leaves the one before loadable.

A checkpoint is written into a temporary directory beside its place; a manifest with the size and SHA-256 of every file is written
last; everything is flushed, then renamed; then `latest` is pointed to it; only then are old ones removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrl.errors import LLMRLError
from llmrl.train.files import fsync_path, publish, write_atomically

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(LLMRLError):
    """A checkpoint that can't be written, or that is not whole."""


def step_of(path: Path) -> int:
    """The step in a checkpoint's directory name. Raises CheckpointError when it is not such a name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint: its name must be step_ and eight digits")
    return int(match[1])


def verify(path: Path) -> str:
    """What is wrong with the checkpoint in `path`: "" when every file of the manifest has its size and hash."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['size']}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} was changed after it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} can't be read ({error})"
    return ""


class CheckpointStore:
    """The checkpoints `step_00000010`, ... under `root`; the newest `keep` are kept (None: all), and the one called best.

    Example: directory = store.begin(10); (directory / "state.json").write_text("{}"); store.finish(10, written(directory)); store.newest()
    """

    def __init__(self, root: Path | str, keep: int | None = 2) -> None:
        self.root = Path(root)
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def begin(self, step: int) -> Path:
        """The directory to write the checkpoint of `step` into; then `finish` or `abandon` it.

        Raises CheckpointError when the disk is full or not writable.
        """
        temporary = self._temporary(step)
        with self.explained(step):
            self.root.mkdir(parents=True, exist_ok=True)
            self._clean()
            temporary.mkdir()
        return temporary

    def finish(self, step: int, files: Mapping[str, Mapping[str, Any]]) -> Path:
        """Publishes what was written as the checkpoint of `step` and returns its path; `files` are those that `written` described.

        Raises CheckpointError when the disk is full or not writable. What was there before is then as it was.
        """
        final, temporary = self.path(step), self._temporary(step)
        with self.explained(step):
            (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
            publish(temporary, final)
            self.point_to(final)
        self._prune(step)
        return final

    def abandon(self, step: int) -> None:
        """Removes what was begun: half a checkpoint must not keep a full disk full."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)

    @contextmanager
    def explained(self, step: int) -> Iterator[None]:
        """Turns what a full or unwritable disk raises inside into a CheckpointError."""
        try:
            yield
        except Exception as error:
            if not _is_io_error(error):
                raise
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.root}: {error}. Earlier checkpoints are as they were. "
                "Make room or choose another output_dir, then start the same command again: it continues from the newest one"
            ) from error

    def _temporary(self, step: int) -> Path:
        return self.root / f".tmp_{self.path(step).name}"

    def newest(self) -> Path | None:
        """The checkpoint that `latest` points to if it is whole, else the whole one of the highest step, else None."""
        for path in self._candidates():
            if not verify(path):
                return path
        return None

    def all(self) -> list[Path]:
        """Finished or not, by step."""
        if not self.root.is_dir():
            return []
        return sorted((p for p in self.root.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)

    def point_to(self, path: Path) -> None:
        """Makes `path` the one that `newest` prefers."""
        write_atomically(self.root / "latest", path.name + "\n")

    def best(self) -> Path | None:
        """The checkpoint that was called best; None without one."""
        pointer = self.root / "best"
        path = self.root / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
        return path if path in self.all() else None

    def call_best(self, step: int | None) -> None:
        """Keeps the checkpoint of `step` until another one is called best; None: keeps none."""
        if step is None:
            (self.root / "best").unlink(missing_ok=True)
        elif self.root.is_dir():
            write_atomically(self.root / "best", self.path(step).name + "\n")

    def _candidates(self) -> Iterator[Path]:
        pointer = self.root / "latest"
        pointed = self.root / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
        found = self.all()
        if pointed in found:
            yield pointed
        yield from (p for p in reversed(found) if p != pointed)

    def _prune(self, saved: int) -> None:
        """Keeps the newest `keep` and the best. Later steps than the one saved belong to a branch that was left by resuming before it."""
        if self.keep is None:
            return
        found = self.all()
        branch = [p for p in found if step_of(p) <= saved]
        kept = [*branch[-self.keep :], self.best()]
        for path in found:
            if path not in kept:
                # Renamed first: a half-deleted directory must not look like a checkpoint.
                doomed = path.with_name(f".old_{path.name}")
                shutil.rmtree(doomed, ignore_errors=True)
                os.rename(path, doomed)
                shutil.rmtree(doomed)

    def _clean(self) -> None:
        """Removes what a killed save left."""
        for path in self.root.iterdir():
            if path.name.startswith((".tmp_", ".old_")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def written(directory: Path, files: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """Size and hash of the files in `directory` (or of some), flushed to the disk, by path from there: the manifest's entries.

    Each process describes its own, so that nobody has to read everything again.
    """
    out = {}
    for file in sorted(directory.rglob("*") if files is None else files):
        if file.is_file():
            fsync_path(file)
            out[str(file.relative_to(directory))] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    return out


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_io_error(error: BaseException) -> bool:
    """safetensors reports a full disk as an exception of its own, with the operating system's text in it."""
    return isinstance(error, OSError) or "No space left" in str(error) or "I/O error" in str(error)
