"""A mixture of files of records (or of preferences) by weights: a number of rows of each, drawn and shuffled by a seed.

python data_scripts/mix.py data/math_train.jsonl:0.6 data/gsm8k_train.jsonl:0.3 data/sat.jsonl:0.1 --size 8000 --output data/mix.jsonl

No row is taken twice unless `--repeat` says so; then a file that is too small is gone through again, with "~2" behind the ids.
"""

import random
from collections.abc import Sequence

from _common import parser, read, write


def shares(weights: Sequence[float], size: int) -> list[int]:
    """Whole numbers that sum to size, in proportion to the weights as nearly as can be.

    >>> shares([0.5, 0.25, 0.25], 10)
    [5, 3, 2]
    """
    exact = [size * w / sum(weights) for w in weights]
    counts = [int(e) for e in exact]
    rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in rest[: size - sum(counts)]:
        counts[i] += 1
    return counts


def draw(rows: Sequence[dict], count: int, rng: random.Random, where: str, repeat: bool) -> list[dict]:
    """`count` rows in a random order; again from the beginning, in another order, where there are too few and they may repeat."""
    if count > len(rows) and not repeat:
        raise SystemExit(
            f"{where} has {len(rows)} rows, and {count} are wanted: a smaller --size or weight, or --repeat"
        )
    passes = [rng.sample(rows, len(rows)) for _ in range(-(-count // len(rows)))] if rows else []
    again = ([{**row, "id": f"{row['id']}~{n}"} for row in one] if n > 1 else one for n, one in enumerate(passes, 1))
    return [row for one in again for row in one][:count]


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("files", nargs="+", metavar="FILE[:WEIGHT]", help="default weight: 1")
    made.add_argument("--size", type=int, required=True, help="rows of the mixture")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--repeat", action="store_true", help="rows may be taken more than once")
    args = made.parse_args()
    named = [(file, weight) if weight.replace(".", "", 1).isdigit() else (name, "1") for name in args.files for file, _, weight in [name.rpartition(":")]]  # fmt: skip
    weights = [float(weight) for _, weight in named]
    if args.size < 1 or not sum(weights):
        raise SystemExit(f"--size {args.size} and weights {weights}: both must be above 0")
    rng = random.Random(args.seed)
    counts = shares(weights, args.size)
    parts = [draw(list(read(file)), n, rng, file, args.repeat) for (file, _), n in zip(named, counts)]
    rows = [row for part in parts for row in part]
    print(", ".join(f"{file} {n}" for (file, _), n in zip(named, counts)))
    write(rng.sample(rows, len(rows)), args)
