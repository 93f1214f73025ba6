"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168) as {id, source, question, solution, answer}.

    python data_scripts/gsm8k.py --split train --output data/gsm8k_train.jsonl
    python data_scripts/gsm8k.py --source raw/test.jsonl --split test --output data/gsm8k_test.jsonl

The final answer stands after "####" in the published answer; thousands separators are removed.
"""

from __future__ import annotations

import argparse
from typing import Any

from _common import read, write


def normalise(row: dict[str, Any], i: int, split: str) -> dict[str, Any]:
    """A published row, or one that is in our form already.

    >>> normalise({"question": "1+1?", "answer": "1+1=2\\n#### 1,002"}, 3, "train")["answer"]
    '1002'
    """
    if "solution" in row:
        return {**row, "id": row.get("id", f"gsm8k/{split}/{i:05d}")}
    solution, _, answer = row["answer"].partition("####")
    if not answer.strip():
        raise SystemExit(f"row {i}: no '####' in the answer")
    return {
        "id": f"gsm8k/{split}/{i:05d}",
        "source": f"GSM8K {split}",
        "question": row["question"].strip(),
        "solution": solution.strip(),
        "answer": answer.strip().replace(",", ""),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="openai/gsm8k", help="hub id, or the published train.jsonl / test.jsonl")
    parser.add_argument("--split", default="train", choices=["train", "test"])
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    write(
        (normalise(r, i, args.split) for i, r in enumerate(read(args.source, name="main", split=args.split))),
        args.output,
    )
