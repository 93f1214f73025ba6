"""MBPP, sanitized (Austin et al. 2021, arXiv 2108.07732) as {id, source, prompt, canonical_solution, test_imports, tests}.

python data_scripts/mbpp.py --output data/mbpp.jsonl
python data_scripts/mbpp.py --source raw/sanitized-mbpp.json --output data/mbpp.jsonl
"""

from __future__ import annotations

import argparse
from typing import Any

from _common import read, write


def normalise(row: dict[str, Any]) -> dict[str, Any]:
    """A published row, or one that is in our form already.

    >>> normalise({"task_id": 2, "prompt": "p", "code": "c", "test_imports": [], "test_list": ["assert f()"]})["tests"]
    ['assert f()']
    """
    if "tests" in row:
        return row
    return {
        "id": f"mbpp/{row['task_id']}",
        "source": "MBPP sanitized",
        "prompt": row["prompt"].strip(),
        "canonical_solution": row["code"],
        "test_imports": list(row["test_imports"]),
        "tests": list(row["test_list"]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source", default="google-research-datasets/mbpp", help="hub id, or the published sanitized-mbpp.json"
    )
    parser.add_argument("--split", default="train", choices=["train", "test", "validation", "prompt"])
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    write((normalise(r) for r in read(args.source, name="sanitized", split=args.split)), args.output)
