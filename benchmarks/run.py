"""llmrl beside TRL on the same model, data and steps: `make bench`.

Every measurement is a fresh process with one thread (BENCH_THREADS), ours and the peer's in turn, so that both see the same machine.
CPU seconds (user + system) of the training loop are what is compared: on a shared machine they move less than the wall clock.
Prints a JSON line {"task", "metric", "ours", "peer", "ratio", "floor"} for each figure; ratio above 1 means that ours is better.
ROUNDS=3 takes medians of three. Raw lines go to build/bench/raw.jsonl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import tasks  # noqa: E402
from assets import VOCABULARY, assets_dir, build  # noqa: E402

TIMEOUT = 600  # seconds of one measurement

# task -> (arguments of ours and of the floor, arguments of the peer)
SFT, BIG = ["sft", "--rows", "128"], ["sft", "--model", "bigvocab", "--rows", "16"]
TASKS = {
    "sft/padded": ([*SFT, "--batch-size", "16"], [*SFT, "--batch-size", "16"]),
    "sft/bfd": ([*SFT, "--batch-size", "13"], [*SFT, "--batch-size", "2", "--packing", "bfd"]),  # 10 steps each
    "sft-151936/padded": ([*BIG, "--batch-size", "8"], [*BIG, "--batch-size", "8"]),
    "grpo/beta0": (["grpo", "--steps", "3"], ["grpo", "--steps", "3"]),
    "grpo/beta0.04": (["grpo", "--steps", "2", "--beta", "0.04"], ["grpo", "--steps", "2", "--beta", "0.04"]),
}
NO_FLOOR = ("grpo/beta0.04",)  # the bare loop has no reference model


def main() -> None:
    started = time.time()
    rounds = int(os.environ.get("ROUNDS", "1"))
    wanted = sys.argv[1:] or list(TASKS)
    if unknown := set(wanted) - set(TASKS):
        raise SystemExit(f"no task {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    build()
    raw = assets_dir() / "raw.jsonl"
    for name in wanted:
        ours, peer = TASKS[name]
        lines = defaultdict(list)
        for i in range(rounds):
            pairs = [("ours", ours), ("peer", peer)] + ([("floor", ours)] if name not in NO_FLOOR else [])
            for side, arguments in pairs if i % 2 == 0 else pairs[::-1]:
                line = measure(side, arguments)
                lines[side].append(line)
                with raw.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"task": name, "side": side, "round": i, **line}) + "\n")
        report(name, {side: _medians(found) for side, found in lines.items()})
    print(
        json.dumps({"seconds": round(time.time() - started), "rounds": rounds, "load": round(os.getloadavg()[0], 2)}),
        flush=True,
    )


def measure(side: str, arguments: list[str]) -> dict[str, float]:
    """Runs one side in a fresh process and returns its RESULT line. Ends the benchmark, with the end of the output, when it fails."""
    command = [sys.executable, str(HERE / f"{side}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not found:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}:\n{(done.stderr or done.stdout)[-3000:]}")
    return json.loads(found[-1].removeprefix("RESULT "))


def report(name: str, sides: dict[str, dict[str, float]]) -> None:
    ours, peer, floor = sides["ours"], sides["peer"], sides.get("floor", {})
    for side in (peer, floor):
        if side and abs(side["tokens"] / ours["tokens"] - 1) > 0.02:  # 10 steps of 13 rows repeat two of 128
            print(json.dumps({"task": name, "note": "tokens differ", "ours": ours["tokens"], "other": side["tokens"]}))

    def rate(line):
        return line["tokens"] / line["cpu_s"] if line else None

    emit(name, "tokens_per_cpu_s", rate(ours), rate(peer), rate(floor))
    key = "peak_over_imports_mb"
    emit(name, key, ours[key], peer[key], floor.get(key), less_is_better=True)
    if name.startswith("grpo"):
        emit(name, "cpu_s_per_step", *(x and x["cpu_s"] / x["steps"] for x in (ours, peer, floor)), less_is_better=True)
        return
    emit(name, "model_flop_utilisation", *(x and _utilisation(name, x) for x in (ours, peer, floor)))


def emit(
    task: str, metric: str, ours: float, peer: float, floor: float | None, *, less_is_better: bool = False
) -> None:
    ratio = peer / ours if less_is_better else ours / peer
    figures = {"ours": ours, "peer": peer, "ratio": ratio, "floor": floor or None}
    print(
        json.dumps({"task": task, "metric": metric, **{k: v and round(v, 3) for k, v in figures.items()}}), flush=True
    )


def _utilisation(name: str, line: dict[str, float]) -> float:
    """Useful operations a CPU second, as a share of what a matrix product reaches in the same process."""
    vocabulary = VOCABULARY["bigvocab" if "151936" in name else "small"]
    useful = tasks.sft_flops(
        hidden=256, layers=4, intermediate=704, kv=128, vocabulary=vocabulary,
        tokens=int(line["tokens"]), loss_tokens=int(line["loss_tokens"]),
    )  # fmt: skip
    return useful / line["cpu_s"] / (line["matmul_gflops"] * 1e9)


def _medians(lines: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(line[key] for line in lines) for key in lines[0]}


if __name__ == "__main__":
    main()
