"""Samples as they finish, in a file that a killed evaluation goes on from.

The first line tells the settings, each further one is a sample as the engine gave it: what was sampled is kept, scores are made anew.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from llmrl.errors import ConfigError, DataError
from llmrl.evaluation.manifest import differences
from llmrl.types import Completion

FORMAT = "llmrl-samples/1"
SCORING = ("verifier", "versions.math-verify", "data.path")
"""What of a manifest does not change what is sampled; data are known by their hash."""


def journal_path(output: Path) -> Path:
    """Where the samples of a result file are: results.json -> results.samples.jsonl."""
    return output.with_suffix(".samples.jsonl")


class Journal:
    """The samples of one evaluation, in `path`; as a context it closes the file.

    Opening one that is there takes its samples over, but for a last line that a kill has torn. Raises ConfigError for a journal of other
    settings, with what differs (`overwrite` begins anew), for a file that is no journal, and for one that another process writes to now.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = path
        self._samples: dict[tuple[str, int], dict[str, Any]] = {}
        self._file: IO[bytes] = path.open("ab+")
        try:
            self._lock()
            self._file.seek(0)
            whole, newline, _ = self._file.read().rpartition(b"\n")
            self._file.truncate(len(whole) + len(newline))
            lines = whole.split(b"\n") if newline else []
            if lines and (different := self._other(lines[0], manifest)):
                if not overwrite:
                    raise ConfigError(
                        f"{path} holds samples of another evaluation: {'; '.join(different)}. Give another --output, or --overwrite to "
                        "throw them away"
                    )
                self._file.truncate(0)
                lines = []
            for number, line in enumerate(lines[1:], start=2):
                self._take(line, number)
            if not lines:
                self._write({"format": FORMAT, "manifest": manifest})
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._samples)

    def found(self, problem: str, sample: int) -> Completion | None:
        """The sample of that number, from 0, if it is there already."""
        row = self._samples.get((problem, sample))
        if row is None:
            return None
        return Completion(tuple(row["ids"]), (), row["finish"], row["text"])

    def add(self, problem: str, sample: int, completion: Completion) -> None:
        """Writes a finished sample down, so that a kill right after this call does not lose it."""
        ids, text = list(completion.ids), completion.text
        self._write({"id": problem, "sample": sample, "finish": completion.finish_reason, "ids": ids, "text": text})

    def _write(self, row: Mapping[str, Any]) -> None:
        # Half a surrogate pair has no UTF-8; as a backslash escape it is JSON.
        self._file.write(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._file.flush()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{self.path} is being written by another evaluation; wait for it, or give another --output"
            ) from error

    def _other(self, line: bytes, manifest: Mapping[str, Any]) -> list[str]:
        try:
            header = json.loads(line)
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ConfigError(f"{self.path} is there and is no file of samples; give another --output")
        return differences(header["manifest"], manifest, ignore=(*SCORING, "sampling.n"))

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            self._samples[row["id"], row["sample"]] = {key: row[key] for key in ("finish", "ids", "text")}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}:{number} can't be read ({error}); remove the line, and it is sampled again"
            ) from error
