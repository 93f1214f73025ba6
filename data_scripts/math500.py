"""MATH-500 (Lightman et al. 2023, arXiv 2305.20050) as {id, source, problem, solution, answer, subject, level}.

python data_scripts/math500.py --output data/math500.jsonl
"""

from __future__ import annotations

import argparse
from typing import Any

from _common import read, write


def normalise(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the hub data set, or one that is in our form already."""
    if not str(row["answer"]).strip():
        raise SystemExit(f"{row.get('unique_id') or row.get('id')}: empty answer")
    return {
        "id": row["id"] if "id" in row else f"math500/{row['unique_id']}",
        "source": "MATH-500",
        **{key: row[key] for key in ("problem", "solution", "answer", "subject", "level")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="HuggingFaceH4/MATH-500", help="hub id or a local file")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    write(map(normalise, read(args.source, split="test")), args.output)
