"""Messages between a reward runner and its workers: a 4-byte big-endian length, then JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

_LENGTH = struct.Struct(">I")
MAX_BYTES = 1 << 30


def encode(message: Any) -> bytes:
    """The frame of one message. Raises ValueError above 1 GiB and TypeError for what JSON can't hold."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Turns bytes, in whatever pieces they arrive, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete by now. Raises ValueError when the stream holds something else."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_BYTES:
                raise ValueError(f"a message of {length} bytes was announced; the stream is not ours")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(json.loads(bytes(self._buffer[_LENGTH.size : end])))
            del self._buffer[:end]
        return messages


def read_message(fd: int) -> Any:
    """Blocks for one message; None when the other side has closed the pipe."""
    header = _read_exactly(fd, _LENGTH.size)
    if header is None:
        return None
    body = _read_exactly(fd, _LENGTH.unpack(header)[0])
    return None if body is None else json.loads(body)


def write_message(fd: int, message: Any) -> None:
    """Writes one message whole, blocking."""
    view = memoryview(encode(message))
    while view:
        view = view[os.write(fd, view) :]


def _read_exactly(fd: int, count: int) -> bytes | None:
    parts, missing = [], count
    while missing:
        part = os.read(fd, min(missing, 1 << 20))
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
