"""What a verdict of the math verifier costs: called directly, through the runner's workers, and by math-verify alone. Prints JSON lines.

    python benchmarks/verifiers.py [--repeat 4] [--workers 1 2]

The answers are the labelled ones of the tests. `overhead_ms` is the runner's wall time a call less that of a direct call of the same
function just before, amortised over all calls: the median of several rounds, and all rounds in order. Workers have loaded by then, as they have in a run
by the time that its model has. math-verify's agreement is with LaTeX between dollar signs, as it wants it.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from llmrl.config.reward import RewardSpec
from llmrl.rewards import RewardRunner
from llmrl.rewards.math import math_answer
from llmrl.types import Completion, Prompt, Rollout

ROUNDS, LOAD_SECONDS = 5, 8.0
PAIRS = Path(__file__).resolve().parents[1] / "tests" / "rewards" / "math_pairs.jsonl"


def by_math_verify(row: dict) -> bool:
    """math-verify's verdict, without its time limits."""
    from math_verify import parse, verify

    texts = [row["gold"], row["candidate"]]
    if row["notation"] == "latex":
        texts = [t if "$" in t or "boxed" in t else f"${t}$" for t in texts]
    gold, answer = (parse(t, parsing_timeout=None) for t in texts)
    return bool(verify(gold, answer, timeout_seconds=None))


def by_llmrl(row: dict) -> bool:
    """The verdict of `math_answer`."""
    return math_answer.score(row["candidate"], answer=row["gold"]) == 1.0


def agreement(name: str, judge: Callable[[dict], bool], rows: list[dict]) -> None:
    """Prints agreement with the labels by notation, wrong answers accepted, and milliseconds a verdict."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    begun = time.perf_counter()
    for row in rows:
        verdict = judge(row)
        for key in (row["notation"], "all"):
            counts[key][0] += 1
            counts[key][1] += verdict == row["expected"]
            counts[key][2] += verdict and not row["expected"]
    each = (time.perf_counter() - begun) / len(rows) * 1000
    agreed = {k: round(right / n, 4) for k, (n, right, _) in counts.items()}
    print(json.dumps({"bench": "agreement", "verifier": name, "rows": len(rows), "agreement": agreed,
                      "wrong_accepted": counts["all"][2], "ms_a_verdict": round(each, 3)}), flush=True)  # fmt: skip


def overhead(rows: list[dict], repeat: int, workers: int) -> None:
    """Prints what the runner adds to a call, for the cheapest work there is: equal texts."""
    completions = [rf"so \boxed{{{i % 97}}}" for i in range(len(rows) * repeat)]
    rollouts = [
        Rollout(Prompt(str(i), (), "", {"answer": str(i % 97)}), Completion((), (), "stop", text))
        for i, text in enumerate(completions)
    ]
    with RewardRunner([RewardSpec(function="math_answer")], workers=workers) as runner:
        runner.score(rollouts[:64])
        time.sleep(LOAD_SECONDS)
        runner.score(rollouts[:64])
        direct, through = [], []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            for i, text in enumerate(completions):
                math_answer.score(text, answer=str(i % 97))
            between = time.perf_counter()
            scored = runner.score(rollouts)
            direct.append((between - begun) / len(rollouts) * 1000)
            through.append((time.perf_counter() - between) / len(rollouts) * 1000)
            assert all(s.reward == 1.0 for s in scored)
    added = [t - d for t, d in zip(through, direct, strict=True)]
    print(json.dumps({"bench": "runner", "calls": len(rollouts), "workers": workers,
                      "direct_ms": round(statistics.median(direct), 4), "runner_ms": round(statistics.median(through), 4),
                      "overhead_ms": round(statistics.median(added), 4), "rounds_ms": [round(a, 4) for a in added]}),
          flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = [json.loads(line) for line in PAIRS.open(encoding="utf-8")]
    math_answer.warm_up()
    agreement("math_answer", by_llmrl, rows)
    agreement("math-verify", by_math_verify, rows)
    for workers in options.workers:
        overhead(rows, options.repeat, workers)


if __name__ == "__main__":
    main()
