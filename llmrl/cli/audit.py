"""`llmrl audit-verifier FILE [--verifier NAME] [--json]`: a verifier's verdicts against labelled answers, by the same code as training."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from llmrl.config.reward import RewardSpec
from llmrl.errors import ConfigError, DataError
from llmrl.rewards.base import NOT_APPLICABLE, TIMEOUT
from llmrl.rewards.runner import RewardRunner
from llmrl.types import Completion, Prompt, Rollout, ScoredRollout

SHOWN_CHARACTERS = 200
_LABELS = {"true": True, "1": True, "yes": True, "correct": True, "false": False, "0": False, "no": False, "incorrect": False}  # fmt: skip


@dataclass(frozen=True)
class LabelledAnswer:
    """One row of the file: a reference, an answer to it (bare or a whole completion), and whether the label says that it is right."""

    line: int
    gold: str
    answer: str
    correct: bool


def run(argv: Sequence[str]) -> int:
    """Prints how the verifier agrees with the labels, and each disagreement. Returns 0 also when there are disagreements."""
    parser = argparse.ArgumentParser(
        prog="llmrl audit-verifier",
        description="Runs a verifier on labelled answers: JSONL rows {gold, candidate, expected} or {gold, completion, correct}.",
    )
    parser.add_argument(
        "file", metavar="FILE", help="JSON lines; other columns are ignored, both kinds of rows may be mixed"
    )
    parser.add_argument("--verifier", default="math_answer", help="as in a recipe: a built-in name, or path/file.py:function (default: %(default)s)")  # fmt: skip
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of one row (default: the verifier's)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args(argv)
    if options.workers < 1:
        raise ConfigError(f"--workers is {options.workers}; give 1 or more")
    if options.timeout is not None and not options.timeout > 0:
        raise ConfigError(f"--timeout is {options.timeout:g}; give a number of seconds above 0")
    if options.json:  # logs must not come after, or into, the object
        logging.basicConfig(stream=sys.stderr)
    rows = read_rows(Path(options.file))
    report = audit(rows, options.verifier, timeout=options.timeout, workers=options.workers)
    _show(report, Console(file=sys.stderr if options.json else sys.stdout, highlight=False, soft_wrap=True))
    if options.json:
        print(json.dumps(report), flush=True)
    return 0


def read_rows(path: Path) -> list[LabelledAnswer]:
    """The labelled answers of a JSON lines file. Raises DataError with the number of the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(
            f"{path} can't be read: {error.strerror or error}; give the path of a JSON lines file"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is not JSON: {error}") from error
            rows.append(_row(value, number, path))
    if not rows:
        raise DataError(
            f"{path} has no rows; each line holds {{gold, candidate, expected}} or {{gold, completion, correct}}"
        )
    return rows


def _row(value: Any, number: int, path: Path) -> LabelledAnswer:
    where = f"{path}, line {number}"
    if not isinstance(value, Mapping):
        raise DataError(f"{where} holds a {type(value).__name__}; a row is an object")
    for answer, label in (("candidate", "expected"), ("completion", "correct")):
        if "gold" in value and answer in value and label in value:
            texts = [value["gold"], value[answer]]
            texts = ["" if t is None else t for t in texts]  # no answer was given; a row without a reference is listed
            if any(not isinstance(t, str | int | float) for t in texts):
                raise DataError(f"{where}: `gold` and `{answer}` are texts or numbers")
            return LabelledAnswer(number, str(texts[0]), str(texts[1]), _label(value[label], f"{where}: `{label}`"))
    raise DataError(
        f"{where} has the columns {', '.join(sorted(map(str, value))) or '(none)'}; "
        "a row needs gold, candidate and expected, or gold, completion and correct"
    )


def _label(value: Any, where: str) -> bool:
    known = _LABELS.get(str(value).strip().lower()) if isinstance(value, str) else None
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        known = bool(value)
    if known is None:
        raise DataError(f"{where} is {value!r}; a label is true or false")
    return known


def audit(
    rows: Sequence[LabelledAnswer], verifier: str, *, timeout: float | None = None, workers: int = 2
) -> dict[str, Any]:
    """Runs the verifier on each row and counts.

    Returns `agreement` (share of rows whose verdict is the label), `precision` (of the accepted, how many are right), `recall` (of the
    right, how many are accepted; both None where there are none), `timeouts`, `rows`, `outcomes`, `unusable` (lines whose reference can't be used, a null one among them), and `disagreements` as rows. Accepted
    is a value above 0.5; a row without a value (timeout, error, unusable reference) is not accepted. Raises ConfigError for an unknown verifier.
    """
    rollouts = [
        Rollout(Prompt(f"line {r.line}", (), "", {"answer": r.gold}), Completion((), (), "stop", r.answer))
        for r in rows
    ]
    spec = RewardSpec(function=verifier, timeout=timeout)
    with RewardRunner([spec], on_error="skip", workers=workers) as runner:
        name = runner.names[0]
        scored = runner.score(rollouts)
    accepted = [_accepted(s, name) for s in scored]
    right = [r.correct for r in rows]
    both = sum(a and c for a, c in zip(accepted, right, strict=True))
    outcomes: dict[str, int] = {}
    for s in scored:
        outcomes[s.outcomes[name]] = outcomes.get(s.outcomes[name], 0) + 1
    return {
        "agreement": sum(a == c for a, c in zip(accepted, right, strict=True)) / len(rows),
        "precision": both / sum(accepted) if any(accepted) else None,
        "recall": both / sum(right) if any(right) else None,
        "timeouts": outcomes.get(TIMEOUT, 0),
        "rows": len(rows),
        "outcomes": outcomes,
        "unusable": [r.line for r, s in zip(rows, scored, strict=True) if s.outcomes[name] == NOT_APPLICABLE],
        "verifier": verifier,
        "disagreements": [
            {
                "line": r.line,
                "gold": r.gold,
                "answer": r.answer,
                "label": r.correct,
                "accepted": a,
                "outcome": s.outcomes[name],
            }
            for r, a, s in zip(rows, accepted, scored, strict=True)
            if a != r.correct
        ],
    }


def _accepted(scored: ScoredRollout, name: str) -> bool:
    value = scored.parts[name]
    return value is not None and value > 0.5


def _show(report: Mapping[str, Any], console: Console) -> None:
    for row in report["disagreements"]:
        how = "accepted, but labelled wrong" if row["accepted"] else "not accepted, but labelled right"
        odd = "" if row["outcome"] == "score" else f" ({row['outcome']}{_EXPLAINED.get(row['outcome'], '')})"
        console.print(
            Text(f"line {row['line']}: {how}{odd}: gold {_short(row['gold'])}, answer {_short(row['answer'])}")
        )
    if lines := report["unusable"]:
        some = ", ".join(map(str, lines[:20])) + (", ..." if len(lines) > 20 else "")
        console.print(Text(f"not accepted for want of a reference that can be used: {len(lines)} rows (lines {some})"))
    shown = {k: "none" if report[k] is None else f"{report[k]:.4f}" for k in ("agreement", "precision", "recall")}
    console.print(Text(f"{report['verifier']} on {report['rows']} rows: " + ", ".join(f"{k} {v}" for k, v in shown.items())
                       + f", timeouts {report['timeouts']}, disagreements {len(report['disagreements'])}"))  # fmt: skip


_EXPLAINED = {NOT_APPLICABLE: ": the reference can't be used"}


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")
