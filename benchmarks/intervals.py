"""Do the intervals of evaluation cover, and are the p-values of a comparison right? By simulation; prints JSON lines.

    python benchmarks/intervals.py accuracy [--rounds 4000]      coverage of `accuracy_interval` and its mean width
    python benchmarks/intervals.py compare [--rounds 600]        of the difference of two models: coverage, and how often p <= 0.05

The truth is the mean over all problems that there could be. Each round draws new problems by a model of their difficulty, then samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator

import numpy as np

from llmrl.evaluation.metrics import accuracy_interval
from llmrl.evaluation.paired import difference_interval, differences, sign_flip_p_value

Draw = Callable[[np.random.Generator, int], np.ndarray]


def difficulties(p: float) -> Iterator[tuple[str, Draw]]:
    """Models of how the chance to solve a problem differs between problems, all with mean p."""
    yield "same", lambda rng, m: np.full(m, p)
    for total in (0.1, 0.3, 1, 4, 10):
        yield f"beta({total})", lambda rng, m, total=total: rng.beta(p * total, (1 - p) * total, m)
    yield "always or never", lambda rng, m: (rng.random(m) < p).astype(float)
    rare = min(p, 1 - p)
    half = lambda rng, m: 0.5 * (rng.random(m) < 2 * rare)  # noqa: E731
    yield "half or extreme", half if p <= 0.5 else (lambda rng, m: 1 - half(rng, m))
    if (
        rare <= 0.2
    ):  # half of the mean from few problems that are surely solved (or failed), the rest from all others alike
        few = lambda rng, m: np.where(rng.random(m) < rare / 2, 1.0, (rare / 2) / (1 - rare / 2))  # noqa: E731
        yield "few decide", few if p <= 0.5 else (lambda rng, m: 1 - few(rng, m))


def accuracy(rounds: int) -> None:
    """Prints coverage and mean width for each cell, then the least coverage a number of problems and samples."""
    rng, least = np.random.default_rng(0), {}
    for m in (30, 100, 500):
        for k in (1, 4, 16):
            for p in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95):
                for name, draw in difficulties(p):
                    if k == 1 and name != "same":  # one answer a problem: the same distribution
                        continue
                    found = np.array([accuracy_interval(rng.binomial(k, draw(rng, m)), k)[1:] for _ in range(rounds)])
                    cover = float(((found[:, 0] <= p) & (p <= found[:, 1])).mean())
                    width = float((found[:, 1] - found[:, 0]).mean())
                    print(json.dumps({"bench": "coverage", "problems": m, "samples": k, "p": p, "difficulty": name,
                                      "coverage": round(cover, 4), "width": round(width, 4)}), flush=True)  # fmt: skip
                    key = (m, k, name == "few decide")
                    least[key] = min(least.get(key, (1.0, 0.0, "")), (cover, p, name))
    for (m, k, few), (cover, p, name) in least.items():
        print(json.dumps({"bench": "least coverage", "problems": m, "samples": k, "few_decide": few, "rounds": rounds,
                          "coverage": round(cover, 4), "p": p, "difficulty": name}), flush=True)  # fmt: skip


def pairs(p: float) -> Iterator[tuple[str, float, Callable[..., tuple[np.ndarray, np.ndarray]]]]:
    """(name, true difference, (rng, m) -> the chances of A and of B to solve each problem)."""
    for total in (0.3, 1, 4):
        draw = lambda rng, m, total=total: rng.beta(p * total, (1 - p) * total, m)  # noqa: E731
        yield f"no change, beta({total})", 0.0, lambda rng, m, draw=draw: (a := draw(rng, m), a)
        yield f"another model as good, beta({total})", 0.0, lambda rng, m, draw=draw: (draw(rng, m), draw(rng, m))
        yield (f"a fifth less failures, beta({total})", 0.2 * (1 - p),
               lambda rng, m, draw=draw: (a := draw(rng, m), a + 0.2 * (1 - a)))  # fmt: skip
        yield (f"half of the failures of a fifth of the problems, beta({total})", 0.1 * (1 - p),
               lambda rng, m, draw=draw: (a := draw(rng, m), a + 0.5 * (1 - a) * (rng.random(m) < 0.2)))  # fmt: skip
    for won, lost in ((0.02, 0.0), (0.05, 0.0), (0.2, 0.0), (0.05, 0.05), (0.3, 0.3)):
        yield f"always or never, {won} won, {lost} lost", won - lost, lambda rng, m, w=won, x=lost: _certain(rng, m, p, w, x)  # fmt: skip


def _certain(rng: np.random.Generator, m: int, p: float, won: float, lost: float) -> tuple[np.ndarray, np.ndarray]:
    which, base = rng.random(m), (rng.random(m) < p).astype(float)
    a = np.where(which < won, 0.0, np.where(which < won + lost, 1.0, base))
    return a, np.where(which < won, 1.0, np.where(which < won + lost, 0.0, base))


def compare(rounds: int) -> None:
    """Prints coverage of the difference's interval, its mean width and how often p <= 0.05, for each cell; then the extremes."""
    rng, least, most = np.random.default_rng(1), {}, {}
    for m in (30, 100, 500):
        for k in (1, 4, 16):
            for p in (0.05, 0.3, 0.7):
                for name, truth, draw in pairs(p):
                    n, inside, widths, rejected = [k] * m, 0, 0.0, 0
                    for _ in range(rounds):
                        a, b = (rng.binomial(k, chances).tolist() for chances in draw(rng, m))
                        _, low, high = difference_interval(a, n, b, n)
                        inside, widths = inside + (low <= truth <= high), widths + high - low
                        rejected += truth == 0 and sign_flip_p_value(differences(a, n, b, n)[0])[0] <= 0.05
                    row = {"problems": m, "samples": k, "p": p, "models": name, "coverage": round(inside / rounds, 4),
                           "width": round(widths / rounds, 4), "rejected": rejected / rounds if truth == 0 else None}  # fmt: skip
                    print(json.dumps({"bench": "difference", **row}), flush=True)
                    least[m, k] = min(least.get((m, k), row), row, key=lambda r: r["coverage"])
                    most[m, k] = max(most.get((m, k), row), row, key=lambda r: r["rejected"] or 0)
    for what, found in (("least coverage of a difference", least), ("most errors of the first kind", most)):
        for row in found.values():
            print(json.dumps({"bench": what, "rounds": rounds, **row}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "compare"])
    parser.add_argument("--rounds", type=int, default=4000)
    given = parser.parse_args()
    {"accuracy": accuracy, "compare": compare}[given.what](given.rounds)


if __name__ == "__main__":
    main()
