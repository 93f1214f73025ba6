"""The quickstart's task: sums of three-digit numbers, worked out column by column with the carry written out.

Most demonstrations forget the carry, so the model that they train adds columns well and decides wrongly: told to be likely, it
forgets; sampled, it sometimes does not. That decision is what reinforcement learning on the sum alone can turn around.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

FORGETFUL = 0.65
"""Share of the demonstrations that drop every carry. Above a half, so that the greedy answer forgets; three sums in ten need none."""

PROBLEMS = {"demonstrations": 12_800, "prompts": 4_800, "held_out": 400}


def question(a: int, b: int) -> str:
    return f"{a}+{b}=?\n"


def solution(a: int, b: int, *, carry: bool) -> str:
    """The columns from the right, then the sum that they give; without `carry` the carried ones are forgotten.

    solution(347, 586, carry=True) is "7+6=13\\n4+8=12+1=13\\n3+5=8+1=9\\n933"; with carry=False the last three lines are
    "4+8=12", "3+5=8" and "823".
    """
    lines, digits, carried = [], "", 0
    for place in range(3):
        x, y = a // 10**place % 10, b // 10**place % 10
        line, total = f"{x}+{y}={x + y}", x + y
        if carried:
            total += carried
            line += f"+{carried}={total}"
        lines.append(line)
        digits = (str(total % 10) if place < 2 else str(total)) + digits
        carried = total // 10 if carry else 0
    return "\n".join([*lines, digits])


def write_files(folder: str | Path, seed: int) -> dict[str, Path]:
    """Writes `demonstrations.jsonl` (prompt, completion), `prompts.jsonl` and `held_out.jsonl` (prompt, answer); returns their paths.

    No sum is in two files, in either order of its numbers. The same seed gives the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    sums = _distinct_sums(rng)
    paths = {}
    for name, count in PROBLEMS.items():
        paths[name] = folder / f"{name}.jsonl"
        with paths[name].open("w", encoding="utf-8") as file:
            for _ in range(count):
                a, b = next(sums)
                file.write(json.dumps(_row(name, a, b, rng)) + "\n")
    return paths


def _row(name: str, a: int, b: int, rng: random.Random) -> Mapping[str, str]:
    if name == "demonstrations":
        return {"prompt": question(a, b), "completion": solution(a, b, carry=rng.random() >= FORGETFUL)}
    return {"id": f"{a}+{b}", "prompt": question(a, b), "answer": str(a + b)}


def _distinct_sums(rng: random.Random) -> Iterator[tuple[int, int]]:
    seen: set[frozenset[int]] = set()
    while True:
        a, b = rng.randint(100, 999), rng.randint(100, 999)
        if frozenset((a, b)) not in seen:
            seen.add(frozenset((a, b)))
            yield a, b
