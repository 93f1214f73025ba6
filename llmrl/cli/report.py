"""`llmrl report RUN_OR_RESULT ... [--output FILE.html]`: one HTML page about runs and results, which needs no network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def run(argv: Sequence[str]) -> int:
    """Writes the page."""
    from llmrl.evaluation.report import MAX_SAMPLES, write_report

    parser = argparse.ArgumentParser(prog="llmrl report", description=__doc__.partition(": ")[2], allow_abbrev=False)
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="RUN_OR_RESULT", help="a run's output_dir, or a result of llmrl eval"
    )
    parser.add_argument(
        "--output", "-o", type=Path, help="the page; default: report.html in the run, or beside the result"
    )
    parser.add_argument(
        "--max-samples", type=int, default=MAX_SAMPLES, help="samples in the page at most (default %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.max_samples < 0:
        parser.error("--max-samples must not be negative")
    path = write_report(args.paths, args.output, max_samples=args.max_samples)
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
