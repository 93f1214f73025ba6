"""Which weights and which tokenizer: digests by which two results can be told to be of the same model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_CHUNK = 2**22


def model_directory(name: str, revision: str = "main") -> Path | None:
    """Where a model's files are: the directory itself, or the snapshot of a hub id in the local cache; None when it is in neither."""
    if Path(name).is_dir():
        return Path(name)
    for file in ("config.json", "adapter_config.json"):
        found = cached_file(
            name, file, revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        if found is not None:
            return Path(found).parent
    return None


def weights_digest(directories: Iterable[Path]) -> str | None:
    """sha256 over the weight files of these directories (an adapter's and its base model's); None where there are none.

    Files are read side by side, and do not have to fit into memory. Their names count, directories' names do not.
    """
    files = [sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern)) for folder in directories]
    every = [file for part in files for file in part]
    if not every:
        return None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1, len(every))) as pool:  # hashing leaves Python's lock alone
        digests = pool.map(_file_digest, every)
        return hashlib.sha256(
            "".join(f"{f.name} {d}\n" for f, d in zip(every, digests, strict=True)).encode()
        ).hexdigest()


def _file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of what a fast tokenizer does with text; chat templates are not part of it."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
