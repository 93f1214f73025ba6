"""Which rows say the same, and which are close to an evaluation set: by exact words, or by the word n-grams that two texts share."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WORDS = 8
SHARE = 0.5
_WORD = re.compile(r"[^\W_]+")


def prompts_of(row: Mapping[str, Any]) -> list[str]:
    """What the user says in a row: a record's, conversation's or preference's user turns, or its problem, question or prompt."""
    for name in ("messages", "prompt", "problem", "question", "instruction", "text"):
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return [value]
        if isinstance(value, list):
            said = [m.get("content") for m in value if isinstance(m, Mapping) and m.get("role") == "user"]
            if texts := [text for text in said if isinstance(text, str) and text.strip()]:
                return texts
    return []


def prompt_hash(row: Mapping[str, Any]) -> str:
    """The same for rows that ask the same: sha256 of the messages (or pair), without case and differences of white space.

    Example: prompt_hash({"question": "1 + 1?"}) == prompt_hash({"question": " 1 +  1?\\n"}) -> True
    """
    asked = [row.get("prompt"), row.get("chosen"), row.get("rejected")] if "chosen" in row else row.get("messages")
    text = " ".join(_texts(asked if asked is not None else prompts_of(row)))
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (f"{value.get('role')}:", str(value.get("content") or ""), str(value.get("tool_calls") or ""))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def words_of(text: str) -> list[str]:
    """Words and numbers in small letters, without punctuation.

    Example: words_of("What is $2^{10}$?") -> ["what", "is", "2", "10"]
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class Match:
    """The text of an evaluation set that a text is closest to. share: of their n-grams, 1 where the words are the same."""

    id: str
    share: float
    exact: bool


class Overlap:
    """An inverted index of the word n-grams of evaluation texts.

    Two texts are close when one holds at least `share` of the n-grams of the other (the one with fewer), or their words are the same.
    Texts of fewer than `words` words are only compared whole.

    Example: Overlap([("aime24/1", "Find the ...")]).closest("find THE ...") -> Match("aime24/1", 1.0, True)
    """

    def __init__(self, texts: Iterable[tuple[str, str]], *, words: int = WORDS, share: float = SHARE) -> None:
        self._words, self._share = words, share
        self._ids: list[str] = []
        self._sizes: list[int] = []
        self._whole: dict[str, int] = {}
        self._having: dict[str, list[int]] = {}
        for id, text in texts:
            found = words_of(text)
            if not found:
                continue
            number = len(self._ids)
            grams = self._grams(found)
            self._ids.append(id)
            self._sizes.append(len(grams))
            self._whole.setdefault(" ".join(found), number)
            for gram in grams:
                self._having.setdefault(gram, []).append(number)

    def __len__(self) -> int:
        return len(self._ids)

    def closest(self, text: str) -> Match | None:
        """The closest evaluation text that is close enough, or None."""
        found = words_of(text)
        same = self._whole.get(" ".join(found))
        if same is not None:
            return Match(self._ids[same], 1.0, True)
        grams = self._grams(found)
        shared = Counter(number for gram in grams for number in self._having.get(gram, ()))
        shares = [(count / min(len(grams), self._sizes[number]), -number) for number, count in shared.items()]
        share, number = max(shares, default=(0.0, 0))
        return Match(self._ids[-number], share, False) if share >= self._share else None

    def closest_of(self, texts: Sequence[str]) -> Match | None:
        """The closest of several texts' matches."""
        found = [match for text in texts if (match := self.closest(text)) is not None]
        return max(found, key=lambda m: (m.exact, m.share), default=None)

    def _grams(self, found: Sequence[str]) -> set[str]:
        return {" ".join(found[i : i + self._words]) for i in range(len(found) - self._words + 1)}
