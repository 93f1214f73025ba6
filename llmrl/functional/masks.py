"""Which tokens get a policy gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

GlobalSum = Callable[[Sequence[float]], Sequence[float]]

MAX_ENTROPY = 64.0  # nats; the entropy over a vocabulary of V is at most log V
BISECTIONS = 60  # 64 / 2^60 is below the spacing of float32 at any entropy that matters


def top_entropy_threshold(entropies: Tensor, quantile: float, global_sum: GlobalSum | None = None) -> float:
    """The largest t such that at least ceil(quantile * N) of the N entropies are >= t; ties at t are all kept.

    Keep the tokens with `entropies >= t` ("forking tokens", Wang et al. 2025, arXiv 2506.01939, quantile 0.2). Take the
    entropies of a pass before the update, over the whole update: then the selection does not depend on the cut into microbatches.
    `global_sum` adds up counts over all processes; bisection on counts then finds the same t everywhere without gathering the
    entropies. They must be in [0, 64) nats.
    """
    add = global_sum or list
    want = math.ceil(quantile * add([float(entropies.numel())])[0] - 1e-9)  # 0.28 * 25 is 7.000000000000001
    low, high = 0.0, MAX_ENTROPY
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if add([float((entropies >= middle).sum())])[0] >= want:
            low = middle
        else:
            high = middle
    return low
