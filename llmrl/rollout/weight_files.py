"""One version of the weights as safetensors files, in a directory that trainer and servers see."""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmrl.errors import RolloutError
from llmrl.rollout.fingerprint import Fingerprint, fingerprint

BUCKET_BYTES = 2**30
"""Bytes of tensors in one file, and so held at once; a larger tensor has a file of its own."""
_PREFIX = "llmrl-"
_LOCK = "in-use"


@dataclass(frozen=True)
class Shipment:
    """One version, ready to be loaded: `content` is the fingerprint of all tensors as they were cast, `shapes` theirs by name."""

    label: str
    content: Fingerprint
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    files: tuple[Path, ...] = ()
    seconds: float = 0.0


class WeightFiles:
    """The files of one run, in `parent`/llmrl-<run_id>, which only this user can read; they go when the process ends.

    A lock tells the directories of live runs from those of killed ones; the latter are removed when the next run writes there.
    """

    def __init__(self, parent: Path, run_id: str) -> None:
        self.path = Path(parent).absolute() / f"{_PREFIX}{run_id}"
        self._lock: int | None = None
        self._pid = 0

    def write(self, weights: Iterable[tuple[str, torch.Tensor]], label: str, dtype: torch.dtype) -> Shipment:
        """Writes each tensor, cast to `dtype` where it is floating; at most a bucket of them is held, and one tensor more.

        The version before is removed first, so that there is room: a server that restarts meanwhile is sent this one. Raises
        RolloutError when the files can't be written; `weights` is iterated to its end all the same, since other processes gather with
        this one.
        """
        started = time.perf_counter()
        stream = iter(weights)
        try:
            self._open()
            self.remove()
            shipment = self._write(stream, label, dtype)
        except (OSError, SafetensorError, RolloutError) as error:
            for _ in stream:
                pass
            self.remove()
            if isinstance(error, RolloutError):
                raise
            raise RolloutError(
                f"weights {label} can't be written to {self.path}: {error}. No server was touched. "
                "Set rollout.transfer_dir to a directory with room for the whole model that trainer and servers see."
            ) from error
        return Shipment(label, shipment.content, shipment.shapes, shipment.files, seconds=time.perf_counter() - started)

    def place(self, label: str) -> Path:
        """A path for something else of this version, an adapter for instance; `remove` leaves it alone."""
        self._open()
        return self.path / _safe(label)

    def remove(self) -> None:
        """Removes the files of the version that was written last."""
        for path in self.path.glob("*.weights*"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Removes the directory. May be called twice."""
        if self._lock is not None and self._pid == os.getpid():  # a forked child's exit is not the end of the run
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None
            atexit.unregister(self.close)

    def _open(self) -> None:
        if self._lock is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.path.parent)
        # Made under another name and locked before it gets its own, so that nobody takes it for an abandoned one.
        new = self.path.with_name(f".{self.path.name}")
        new.mkdir(mode=0o700)
        lock = os.open(new / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        new.rename(self.path)
        self._lock, self._pid = lock, os.getpid()
        atexit.register(self.close)

    def _write(self, stream: Iterator[tuple[str, torch.Tensor]], label: str, dtype: torch.dtype) -> Shipment:
        final = self.path / f"{_safe(label)}.weights"
        draft = final.with_suffix(".weights-draft")
        draft.mkdir(mode=0o700)
        content, shapes = Fingerprint(), {}
        names: list[str] = []
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in stream:
            if name in shapes:
                raise RolloutError(f"weights {label} hold {name!r} twice: the server could load only one of them")
            cast = tensor.detach()
            cast = cast.to(dtype) if cast.is_floating_point() else cast
            if bucket and size + cast.nbytes > BUCKET_BYTES:
                names.append(_save(bucket, draft, len(names)))
                size = 0
            content, shapes[name] = content + fingerprint([cast]), tuple(cast.shape)
            bucket[name] = _own(cast)
            size += cast.nbytes
            del tensor, cast
        if bucket:
            names.append(_save(bucket, draft, len(names)))
        if not names:
            raise RolloutError(f"weights {label} hold no tensors: there is nothing to send")
        manifest = {"label": label, "count": content.count, "bytes": content.bytes, "digest": content.hex}
        (draft / "manifest.json").write_text(json.dumps({**manifest, "dtype": str(dtype), "files": names}, indent=1))
        _sync(draft)
        draft.rename(final)
        return Shipment(label, content, shapes, tuple(final / n for n in names))


def remove_abandoned(parent: Path) -> None:
    """Removes the directories of runs that are no more, as `kill -9` leaves them."""
    for path in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # not ours, or not what it looks like
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use
            pass
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, contiguous, and alone in its storage, as safetensors wants it."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _save(bucket: dict[str, torch.Tensor], directory: Path, number: int) -> str:
    """Writes a bucket as a file, empties it, and returns the file's name."""
    needed = sum(t.nbytes for t in bucket.values())
    free = shutil.disk_usage(directory).free
    # Looked at first: in shared memory a full disk can kill the process instead of raising.
    if needed > free:
        raise OSError(f"file {number} needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
    name = f"weights-{number:05}.safetensors"
    save_file(bucket, directory / name)
    bucket.clear()
    _sync(directory / name)
    return name


def _sync(path: Path) -> None:
    """What was written reaches the disk before the servers hear of it (no more than a call in shared memory)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _safe(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", label)
