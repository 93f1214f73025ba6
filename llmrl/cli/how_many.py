"""`llmrl eval --how-many MARGIN --benchmark NAME [--accuracy P] [--result FILE]`: how many samples and problems a margin needs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrl.errors import ConfigError
from llmrl.evaluation.benchmarks import load_spec
from llmrl.evaluation.compare import read_result
from llmrl.evaluation.howmany import DEFAULT_SHARE, Spread, how_many, spread_of


def asked_for(argv: Sequence[str]) -> bool:
    """Whether the arguments of `llmrl eval` ask how many samples are needed, and nothing is to be evaluated."""
    return any(arg.split("=", 1)[0] == "--how-many" for arg in argv)


def run(argv: Sequence[str]) -> int:
    """Prints a table for each benchmark."""
    parser = argparse.ArgumentParser(
        prog="llmrl eval",
        description="How many samples a problem, and how many problems, a 95%% interval of +- MARGIN needs. Nothing is evaluated.",
        allow_abbrev=False,
    )
    parser.add_argument("--how-many", type=float, required=True, metavar="MARGIN", help="wanted half width, such as 0.02")  # fmt: skip
    parser.add_argument("--benchmark", default="", help="names or YAML files, separated by commas: they say how many problems there are")  # fmt: skip
    parser.add_argument("--problems", type=int, metavar="N", help="instead of a benchmark: how many problems there are")
    parser.add_argument("--accuracy", type=float, metavar="P", help="the accuracy that you expect (default: the result's, else 0.5, where it takes most)")  # fmt: skip
    parser.add_argument("--result", metavar="FILE", help="a result of llmrl eval with several samples a problem, whose spread is taken")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="a JSON object a line, one a benchmark")
    options = parser.parse_args(argv)
    result = None if options.result is None else read_result(options.result)
    spread, source = _spread(options.accuracy, options.result, result)
    for name, problems in _sizes(options.benchmark, options.problems, result):
        plan = {"benchmark": name, **how_many(options.how_many, problems, spread), "assumed": source}
        if options.json:
            print(json.dumps(plan))
        else:
            show(plan, Console(highlight=False))
    return 0


def _spread(accuracy: float | None, file: str | None, result: dict[str, Any] | None) -> tuple[Spread, str]:
    if result is None:
        at = 0.5 if accuracy is None else accuracy
        return Spread(at, DEFAULT_SHARE), (
            f"nothing known of this model: accuracy {at:g}, and half of the variance of an answer lies between problems; the worst case is "
            "that all of it does. --result FILE takes both from an evaluation"
        )
    found = spread_of([row["correct"] for row in result["per_row"]])
    if found is None:
        raise ConfigError(
            f"--result {file} does not show how much problems differ: it needs two problems with at least 2 samples each, and both right "
            "and wrong ones. Leave --result out for an assumption"
        )
    at = found.accuracy if accuracy is None else accuracy
    return Spread(at, found.share), (
        f"from {file}: {found.share:.0%} of the variance of an answer lies between problems; accuracy {at:.4g}"
    )


def _sizes(benchmarks: str, problems: int | None, result: dict[str, Any] | None) -> list[tuple[str, int]]:
    names = [name for name in benchmarks.split(",") if name]
    if problems is not None:
        return [(benchmarks or "problems", problems)]
    if not names and result is not None:
        return [(str(result.get("benchmark") or "problems"), len(result["per_row"]))]
    if not names:
        raise ConfigError("--how-many needs --benchmark NAME, --problems N or --result FILE, to know how many problems there are")  # fmt: skip
    sizes: list[tuple[str, int]] = []
    for name in names:
        known = load_spec(name).problems
        if not known:
            raise ConfigError(
                f"benchmark {name} does not say how many problems it has; add --problems N, or `problems: N` to its file"
            )
        sizes += [(name, size) for size in known]
    return sizes


def show(plan: dict[str, Any], console: Console) -> None:
    """The plan as a table, and in words what is enough."""
    margin, problems = plan["margin"], plan["problems"]
    table = Table(title=Text(f"{plan['benchmark']}: {problems} problems, wanted +- {margin:g}"))
    for column in ("samples a problem", "half width", "worst case", "same problems again", "problems needed"):
        table.add_column(column, justify="right")
    for row in plan["rows"]:
        cells = [f"{row[name]:.4f}" for name in ("half_width", "worst_case", "same_problems")]
        table.add_row(str(row["samples"]), *cells, _count(row["problems_needed"]), style="bold" if row["samples"] == plan["samples"] else None)  # fmt: skip
    console.print(table)
    console.print(Text(f"Assumed: {plan['assumed']}."))
    if plan["samples"] is not None:
        console.print(_enough(plan["samples"]))
    elif plan["limit"] > margin:
        console.print(
            f"No number of samples is enough: {problems} problems alone leave +- {plan['limit']:.4f}. It takes {_count(plan['problems_at_limit'])} "
            "problems or more: another benchmark beside it, or a wider margin."
        )
    else:
        console.print(f"{plan['rows'][-1]['samples']} samples a problem are not enough.")
    if plan["samples"] is None and plan["same_problems_samples"] is not None:
        console.print(
            f"Of these very problems alone, whatever other ones would give: {_enough(plan['same_problems_samples'])}"
        )


def _count(problems: int | None) -> str:
    return "over 10,000,000" if problems is None else f"{problems:,}"


def _enough(samples: int) -> str:
    return "1 sample a problem is enough." if samples == 1 else f"{samples} samples a problem are enough."
