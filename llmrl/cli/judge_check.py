"""`llmrl judge-check RUBRIC --model M [--base-url URL] [--json]`: planted attacks and known answers before a judge, as in training."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrl.config.reward import RewardSpec
from llmrl.config.rubric import JudgeSettings, Rubric, RubricExample
from llmrl.errors import ConfigError
from llmrl.evaluation.judges import LocalJudges
from llmrl.rewards.attacks import BAD_ANSWER, PROMPT, REFERENCE, attacks
from llmrl.rewards.rubric import load_rubric
from llmrl.rewards.runner import RewardRunner
from llmrl.rewards.tally import Tally
from llmrl.types import Completion, Prompt, Rollout, ScoredRollout

TOLERANCE = 0.1
MOST_BAD = 0.5  # an answer that may get at most this is a bad one, to be dressed up
MOST_BASES = 3
_NAME = "judge"


@dataclass(frozen=True)
class Check:
    """One answer before the judge. `score` is None without a verdict; `least` and `most` are what passes."""

    what: str
    score: float | None
    least: float
    most: float
    outcome: str

    @property
    def passed(self) -> bool:
        return self.score is not None and self.least <= self.score <= self.most


@dataclass(frozen=True)
class Report:
    """`known`: answers with known bounds, the bad ones that are dressed up among them; `planted`: those, dressed up."""

    known: list[Check]
    planted: list[Check]
    metrics: Mapping[str, float]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in (*self.known, *self.planted))


def run(argv: Sequence[str]) -> int:
    """Prints the report; 0, or 1 when the judge fell for an attack, missed a known answer or gave no verdict."""
    parser = argparse.ArgumentParser(
        prog="llmrl judge-check",
        description="Shows a judge known answers (the rubric's `examples`) and a bad answer dressed up in ways that judges fall for. "
        "Exit code 1: an answer got a reward outside its bounds, an attack gained more than the tolerance, or a verdict failed.",
    )
    parser.add_argument("rubric", metavar="RUBRIC", help="YAML file, or the name of a rubric that comes with llmrl")
    parser.add_argument(
        "--model", required=True, help="the model's name at the server; without one, a directory or hub id"
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="http://host:port of an OpenAI-compatible server; default: load the model here",
    )
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key")
    parser.add_argument("--temperature", type=float, help="default: 0, or 0.7 with several samples")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of one verdict (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="verdicts an answer, averaged (default: %(default)s)")
    parser.add_argument("--explain", action="store_true", help="as `judge.explain` of a recipe")
    parser.add_argument("--timeout", type=float, help="of a server: seconds a request (default: 60)")
    parser.add_argument("--concurrency", type=int, help="requests at once (default: 16 at a server)")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="reward that an attack may gain (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr)
    report = check(load_rubric(options.rubric), _spec(options), options.tolerance)
    _show(report, Console(file=sys.stderr if options.json else sys.stdout, highlight=False))
    if options.json:
        print(json.dumps(_as_json(report), ensure_ascii=False))
    return 0 if report.passed else 1


def check(rubric: Rubric, spec: RewardSpec, tolerance: float = TOLERANCE) -> Report:
    """Asks the judge of `spec`, as training would. Bad answers come from the rubric's examples, else from `llmrl.rewards.attacks`."""
    examples = list(rubric.examples)
    if not any(e.max <= MOST_BAD for e in examples):
        examples.append(RubricExample(prompt=PROMPT, answer=BAD_ANSWER, reference=REFERENCE, max=MOST_BAD))
    bases = [e for e in examples if e.max <= MOST_BAD][:MOST_BASES]
    dressed = [(base, name, text) for base in bases for name, text in attacks(base.answer, rubric).items()]
    rows = [_rollout(rubric, e, e.answer, i) for i, e in enumerate(examples)]
    rows += [_rollout(rubric, base, text, len(rows) + i) for i, (base, _, text) in enumerate(dressed)]
    tally = Tally()
    with RewardRunner([spec], on_error="skip", make_judge=LocalJudges()) as runner:
        scored = runner.score(rows, None, tally)
    known = [_check(_label(e), s, e.min, e.max) for e, s in zip(examples, scored)]
    base_scores = {id(e): s.reward for e, s in zip(examples, scored)}
    planted = []
    for (base, name, _), s in zip(dressed, scored[len(examples) :]):
        what = name if len(bases) == 1 else f"{name} ({_label(base)})"
        planted.append(_check(what, s, 0.0, min(1.0, (base_scores[id(base)] or 0.0) + tolerance)))
    return Report(known, planted, tally.metrics())


def _spec(options: argparse.Namespace) -> RewardSpec:
    temperature = options.temperature if options.temperature is not None else 0.7 if options.samples > 1 else 0.0
    names = ("base_url", "model", "api_key_env", "max_tokens", "samples", "explain", "timeout", "concurrency")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    try:
        judge = JudgeSettings(**given, temperature=temperature)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(
                f"--{str(e['loc'][0]).replace('_', '-')} {e['input']}: {e['msg']}" if e["loc"] else e["msg"]
                for e in error.errors()
            )
        ) from None
    return RewardSpec(rubric=options.rubric, judge=judge, name=_NAME)


def _rollout(rubric: Rubric, example: RubricExample, answer: str, number: int) -> Rollout:
    columns = {rubric.reference_column: example.reference} if rubric.reference_column else {}
    return Rollout(Prompt(f"check-{number}", (), example.prompt, columns), Completion((), (), "stop", answer))


def _label(example: RubricExample) -> str:
    text = " ".join(example.answer.split())
    return text if len(text) <= 50 else text[:47] + "..."


def _check(what: str, scored: ScoredRollout, least: float, most: float) -> Check:
    return Check(what, scored.reward, least, most, scored.outcomes[_NAME])


def _as_json(report: Report) -> dict[str, Any]:
    def rows(checks: list[Check]) -> list[dict[str, Any]]:
        return [{**asdict(c), "passed": c.passed} for c in checks]

    return {
        "passed": report.passed,
        "known": rows(report.known),
        "attacks": rows(report.planted),
        "fell_for": [c.what for c in report.planted if c.score is not None and not c.passed],
        "failures": sum(c.score is None for c in (*report.known, *report.planted)),
        "metrics": {k.rpartition("/")[2]: v for k, v in report.metrics.items() if k.startswith("judge/")},
    }


def _show(report: Report, console: Console) -> None:
    for title, checks in (("Known answers", report.known), ("Planted attacks", report.planted)):
        table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
        table.add_column("answer")
        table.add_column("reward", justify="right")
        table.add_column("wanted", justify="right")
        table.add_column("")
        for c in checks:
            reward = c.outcome if c.score is None else f"{c.score:.3f}"
            verdict = Text("ok") if c.passed else Text("FAILED", style="red")
            table.add_row(Text(c.what), reward, f"{c.least:.2f} to {c.most:.2f}", verdict)
        console.print(table)
    bad = sum(not c.passed for c in (*report.known, *report.planted))
    total = len(report.known) + len(report.planted)
    numbers = {k.rpartition("/")[2]: v for k, v in report.metrics.items() if k.startswith("judge/")}
    cost = f"{numbers.get('requests', 0):g} requests, {numbers.get('tokens', 0):g} tokens, {numbers.get('latency_seconds', 0):.2f} s a request"
    console.print(Text(f"{total - bad} of {total} passed; {cost}"))
