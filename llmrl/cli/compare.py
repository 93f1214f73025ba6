"""`llmrl compare A.json B.json [--json] [--output FILE]`: is B better than A, problem by problem, and how sure is that?"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrl.errors import ConfigError
from llmrl.evaluation.compare import Comparison, compare, plot_comparison, read_result

_PICTURES = (".svg", ".png", ".pdf")


def run(argv: Sequence[str]) -> int:
    """Prints the difference, its interval, a p-value and the problems that changed. Files that can't be compared are an error."""
    parser = argparse.ArgumentParser(
        prog="llmrl compare",
        description="Compares two result files of llmrl eval on one benchmark, problem by problem: B against A.",
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A.json", help="the result to compare with")
    parser.add_argument("b", metavar="B.json", help="the result that is compared with it")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object instead of tables, with all problems that changed"
    )
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="a picture: .svg, .png or .pdf")
    parser.add_argument(
        "--flips",
        type=int,
        default=10,
        metavar="N",
        help="problems listed that B wins, and that it loses (default: %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="compare also what can't be compared, and say why it can't"
    )
    options = parser.parse_args(argv)
    if options.output is not None and options.output.suffix not in _PICTURES:
        raise ConfigError(f"--output {options.output}: the picture's name must end in {', '.join(_PICTURES)}")
    if options.flips < 0:
        raise ConfigError(f"--flips is {options.flips}; give 0 or more")
    found = compare(read_result(options.a), read_result(options.b), files=(options.a, options.b), force=options.force)
    if options.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        show(found, Console(highlight=False), options.flips)
    if options.output is not None:
        try:
            plot_comparison(found, options.output)
        except OSError as error:
            raise ConfigError(f"--output {options.output} can't be written: {error.strerror or error}") from error
        print(f"picture: {options.output}", file=sys.stderr if options.json else sys.stdout)
    return 0


def show(found: Comparison, console: Console, flips: int) -> None:
    """The comparison as tables."""
    for text in (*found.objections, *found.warnings):
        style = "bold red" if text in found.objections else "yellow"
        console.print(Text(f"{'not comparable' if text in found.objections else 'note'}: {text}", style=style))
    table = Table(title=Text(f"{found.benchmark}: {found.problems} problems"))
    for column, justify in (
        ("", "left"),
        ("model", "left"),
        ("samples", "right"),
        ("accuracy", "right"),
        ("95% interval", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, side in (("A", found.a), ("B", found.b)):
        table.add_row(name, Text(side.model), str(side.samples), f"{side.accuracy:.4f}", _interval(side.interval))
    table.add_row("B - A", "", "", f"{found.difference:+.4f}", _interval(found.interval, "+"), style="bold")
    console.print(table)
    console.print(f"p = {found.p_value:.3g} ({found.test}; no difference is the hypothesis)")
    same = found.problems - len(found.won) - len(found.lost)
    console.print(f"problems: {len(found.won)} better in B, {len(found.lost)} worse, {same} as in A")
    for title, changed in (("better in B", found.won), ("worse in B", found.lost)):
        if not changed or not flips:
            continue
        table = Table(title=title)
        table.add_column("problem")
        table.add_column("A", justify="right")
        table.add_column("B", justify="right")
        for flip in changed[:flips]:
            table.add_row(Text(flip.id), f"{flip.a:.3g}", f"{flip.b:.3g}")
        console.print(table)
        if len(changed) > flips:
            console.print(f"and {len(changed) - flips} more; --flips N lists them, --json has all")


def _interval(ends: tuple[float, float], sign: str = "") -> str:
    return f"{ends[0]:{sign}.4f} to {ends[1]:{sign}.4f}"
