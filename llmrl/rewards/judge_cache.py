"""Verdicts on disk, by the hash of everything that they depend on. Several processes may share a file; a kill loses nothing but the
verdict being written."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrl.errors import ConfigError

logger = logging.getLogger("llmrl.rewards")
_BUSY_SECONDS = 10.0


def content_key(**parts: Any) -> str:
    """SHA-256 of the parts as canonical JSON.

    Example: content_key(model="m", answer="a") == content_key(answer="a", model="m")
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class JudgeCache:
    """key -> verdict (JSON), in an SQLite file with a write-ahead log. Threads may share it.

    Raises ConfigError where the file can't be used at the start; a failure later (a full disk, a lock that is held) is warned about
    once, and verdicts are then not kept.

    Example: JudgeCache("runs/judge.sqlite").put(content_key(answer="a"), {"scores": {"correct": 1}})
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._lock, self._warned = Path(path).expanduser(), threading.Lock(), False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict TEXT NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"judge cache {self._path} can't be used ({error}); name another file under `judge.cache`, or move this one away"
            ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        try:
            with self._lock:
                row = self._db.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
            found = None if row is None else json.loads(row[0])
        except (sqlite3.Error, ValueError) as error:
            self._warn(error)
            return None
        return found if isinstance(found, dict) else None

    def put(self, key: str, verdict: Mapping[str, Any]) -> None:
        """Keeps a verdict; what is there already stays."""
        text = json.dumps(verdict)
        try:
            with self._lock:
                self._db.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", (key, text))
        except sqlite3.Error as error:
            self._warn(error)

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0])

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._db.close()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning(
                "judge cache %s: %s; verdicts that can't be read or written are asked for anew", self._path, error
            )
        self._warned = True
