"""Kills training at random moments, resumes it, and compares the end with that of a run that nobody killed: `make torture`.

Five cases: SFT and GRPO, on one process and on two (DDP), and SFT on two that share the parameters (FSDP2). Each kill falls, by the seed, into sampling, scoring, an update, a save, the
writing of the final model, or anywhere. On two processes one is killed; the other must end by itself, with an error that names
the first; every third time both are killed at once. At the end the model, the optimizer, the metrics and the samples must be those
of the unbroken run, bit for bit: on two processes too, since the sum of two numbers does not depend on their order.

    python -m tests.torture.torture --kills 30 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmrl.train.checkpoint import CheckpointStore, verify
from tests.torture import worker
from tests.torture.ranks import Ranks

CASES = [("sft", 1, ""), ("grpo", 1, ""), ("sft", 2, "ddp"), ("grpo", 2, "ddp"), ("sft", 2, "fsdp2")]
PHASES = {
    "sampling": r"sampling", "scoring": r"^scoring", "update": r"update \d+, microbatch \d+/\d+$", "saving": r"saving$",
    "final model": r"writing the model$", "anywhere": r"",
}  # fmt: skip
ALONE_SECONDS = 60.0
"""How long a process may take to notice that the other one is gone, and to end."""
_CLOCKS = re.compile(r"step_time|tokens_per_second|seconds|milliseconds")


@dataclass(frozen=True)
class Kill:
    """The moment: `seconds` after rank `rank` stands for the `count`-th time where `phase` says; `all` processes at once, or it alone."""

    rank: int
    phase: str
    count: int
    seconds: float
    all: bool


class Case:
    """One kind of run on some processes: an unbroken one, and others that are killed and resumed until they end."""

    def __init__(self, kind: str, processes: int, launch: str, model: Path, directory: Path, seed: int) -> None:
        self.kind, self.processes, self.launch, self.model, self.directory = kind, processes, launch, model, directory
        self.name = f"{kind} on {processes} {launch}".strip()
        self.random = random.Random(f"{seed} {self.name}")
        self.kills = 0
        self.whole = directory / "whole"
        with self._start(self.whole) as ranks:
            ranks.wait(300)
            assert ranks.codes == [0] * processes, ranks.error(0)

    def torture(self, kills: int) -> list[str]:
        """Kills `kills` times, over as many runs as that takes; returns what was seen, a line a kill."""
        seen: list[str] = []
        while len(seen) < kills:
            broken = self.directory / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            while len(seen) < kills:
                with self._start(broken) as ranks:
                    line = self._kill(ranks, self._plan())
                if line is None:
                    break  # it ended first
                seen.append(line)
                print(f"{self.name}, kill {len(seen)}: {line}", flush=True)
            with self._start(broken) as ranks:
                ranks.wait(300)
                assert ranks.codes == [0] * self.processes, ranks.error(0)
            self._compare(broken)
        return seen

    def _start(self, out: Path) -> Ranks:
        for file in self.directory.glob("trace*"):
            file.unlink()
        arguments = (self.kind, self.launch, str(self.model), str(out), str(self.directory / "trace"))
        return Ranks(worker.train, self.processes, self.directory / "output", *arguments)

    def _plan(self) -> Kill:
        """Phases in turn, so that a few kills reach all of them; the final model is only reached by runs that are let go on."""
        phases = [p for p in PHASES if self.kind == "grpo" or p not in ("sampling", "scoring")]
        phase = phases[self.kills % len(phases)]
        self.kills += 1
        count = 1 if phase == "final model" else self.random.randint(1, 30 if phase == "anywhere" else 4)
        all_at_once = self.processes == 1 or self.kills % 3 == 0
        return Kill(self.random.randrange(self.processes), phase, count, self.random.uniform(0, 0.03), all_at_once)

    def _kill(self, ranks: Ranks, kill: Kill) -> str | None:
        """Waits for the moment and kills; None when the run ended before."""
        if not self._wait_for(ranks, kill):
            return None
        time.sleep(kill.seconds)
        victims = ranks.processes if kill.all else [ranks.processes[kill.rank]]
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)
        killed = time.monotonic()
        ranks.wait(ALONE_SECONDS)
        if any(code == 0 for code in ranks.codes):
            return None  # it had ended, or the other one had nothing left to wait for
        place = self._places(kill.rank)[-1]
        line = f"{kill.phase}: rank {kill.rank}{' and all others' * (kill.all and self.processes > 1)} at: {place}"
        for rank, code in enumerate(ranks.codes):
            if ranks.processes[rank] in victims:
                assert code == -signal.SIGKILL, (code, ranks.error(rank))
            else:
                text = ranks.error(rank)
                assert code == 2 and f"rank {kill.rank} " in text and "Where each one stands" in text, (code, text)
                line += f"; rank {rank} ended by itself in {time.monotonic() - killed:.1f} s"
        return f"{line}; {self._left()}"

    def _wait_for(self, ranks: Ranks, kill: Kill) -> bool:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if sum(bool(re.search(PHASES[kill.phase], p)) for p in self._places(kill.rank)) >= kill.count:
                return True
            if all(code is not None for code in ranks.codes):
                assert ranks.codes == [0] * self.processes, ranks.error(0)
                return False
            time.sleep(0.002)
        raise AssertionError(f"{self.name} came to nothing in 120 s:\n{ranks.error(0)[-3000:]}")

    def _places(self, rank: int) -> list[str]:
        trace = self.directory / f"trace{rank}"
        return trace.read_text().splitlines() if trace.exists() else []

    def _left(self) -> str:
        """What the kill left. Whatever has a checkpoint's name is whole, at any moment."""
        half = ", ".join(sorted(p.name for p in (self.directory / "broken").rglob(".tmp_*")))
        store = CheckpointStore(self.directory / "broken" / "checkpoints")
        for path in store.all():
            assert not verify(path), (path, verify(path))
        newest = store.newest()
        return f"{half + ' left half; ' if half else ''}continues from {newest.name if newest else 'the beginning'}"

    def _compare(self, broken: Path) -> None:
        """Both runs left the same files, with the same content but for what the clock says."""
        left, right = _files(self.whole), _files(broken)
        assert left.keys() == right.keys(), left.keys() ^ right.keys()
        different = [name for name in left if left[name] != right[name]]
        assert not different, f"{self.name}: not as in the unbroken run: {', '.join(different)}"
        steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, worker.STEPS + 1)), steps


def _files(run: Path) -> dict[str, object]:
    """Weights, optimizer and counters byte for byte; records without the clock. No file is left that a kill may have left half."""
    found: dict[str, object] = {}
    for file in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(file.relative_to(run))
        assert not re.search(r"(^|/)\.(tmp|old)_", name), name
        if file.suffix == ".safetensors" or file.name in ("backend.json", "latest") or file.name.startswith("rng_"):
            found[name] = file.read_bytes()
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if not _CLOCKS.search(k)} for row in rows]
        else:
            found[name] = None
    return found


def torture(model: Path, directory: Path, kills: int, seed: int) -> int:
    """Shares the kills out over the cases; returns how many fell. Raises AssertionError for what a run did not survive."""
    total = 0
    for i, (kind, processes, launch) in enumerate(CASES):
        share = kills // len(CASES) + (i < kills % len(CASES))
        if share:
            case = Case(kind, processes, launch, model, directory / f"{kind}{processes}{launch}", seed)
            total += len(case.torture(share))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    from llmrl.models.init import init_model

    began = time.monotonic()
    with TemporaryDirectory() as directory:
        texts = ["the answer is 12 because three times four is twelve"] * 20
        model = init_model(Path(directory, "model"), texts=texts, vocab_size=384, hidden_size=48, num_layers=2)
        killed = torture(model, Path(directory), args.kills, args.seed)
    print(
        f"{killed} kills in {time.monotonic() - began:.0f} s, seed {args.seed}: every run ended as the unbroken one, bit for bit"
    )


if __name__ == "__main__":
    sys.exit(main())
