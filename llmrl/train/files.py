"""Files that are there whole or not at all, even after a kill or a loss of power."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmrl.errors import ConfigError


def require_writable(directory: Path) -> None:
    """Makes the run directory if it is not there. Raises ConfigError when files can't be written to it."""
    probe = directory / ".tmp_probe"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir {directory} can't be written to: {error}. Choose another output_dir") from error


def fsync_path(path: Path) -> None:
    """Flushes a file or a directory to the disk. Opening for reading is enough, and all that a directory allows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by a file with `text`: a reader, or a restart, finds the old content or the new.

    Half a surrogate pair has no UTF-8; it is written as a backslash escape, which in JSON means the same.
    """
    temporary = path.with_name(f".tmp_{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        fsync_path(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk: half a file must not keep it full
        raise
    fsync_path(path.parent)


def fsync_tree(directory: Path) -> None:
    """Flushes every file below `directory`, and the directories that name them."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


def publish(temporary: Path, final: Path) -> None:
    """Moves a finished directory into its place, which an older one may occupy."""
    fsync_tree(temporary)
    if final.exists():
        old = final.with_name(f".old_{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(temporary, final)
        fsync_path(final.parent)
        shutil.rmtree(old)
    else:
        os.rename(temporary, final)
        fsync_path(final.parent)
