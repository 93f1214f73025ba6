"""Which rows a step takes: a function of (seed, epoch, position) alone, so that a resumed run takes what it would have taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmrl.errors import DataError

_UINT64 = 2**64 - 1


def permutation(n: int, seed: int, stream: int = 0) -> np.ndarray:
    """[n] int64: a permutation of 0..n-1 that is a pure function of (n, seed, stream).

    Sorting raw Philox words (Salmon et al. 2011) rather than `Generator.permutation`: numpy promises the words for good, but
    not its shuffling algorithm, and a checkpoint may be resumed under a newer numpy.
    """
    key = np.array([seed & _UINT64, stream & _UINT64], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


class Sampler:
    """Indices 0..n-1, every one once an epoch; a new order each epoch, or the given one with `shuffle=False`.

    `take(k)` crosses the end of an epoch, so that every step has the same size.

    Example: Sampler(3, seed=0, shuffle=False).take(5) == [0, 1, 2, 0, 1]
    """

    def __init__(self, n: int, *, seed: int = 0, shuffle: bool = True) -> None:
        if n < 1:
            raise DataError("a sampler needs at least one row; the data is empty")
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self._epoch, self._position = 0, 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> float:
        """Passes over the data so far, as a fraction: 1.5 after one and a half."""
        return self._epoch + self._position / self.n

    def take(self, k: int) -> list[int]:
        """The next `k` indices."""
        out: list[int] = []
        while len(out) < k:
            if self._position == self.n:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            part = self._order[self._position : self._position + k - len(out)]
            out += part.tolist()
            self._position += len(part)
        return out

    def state_dict(self) -> dict[str, Any]:
        """The position, and what makes the order; plain JSON."""
        return {
            "n": self.n,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`. Raises DataError when it was saved over other data or another order."""
        for name in ("n", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"the checkpoint's sampler has {name} = {state[name]}, this run has {getattr(self, name)}: rows would be "
                    f"skipped or repeated. Resume with the same data, seed and shuffle, or start anew (resume: never)"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        return permutation(self.n, self.seed, epoch) if self.shuffle else np.arange(self.n)
