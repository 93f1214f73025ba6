"""Ten steps equal five, kill -9, resume, five: bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.algorithms import resume_worker
from tests.processes import run_script

CLOCKS = {"step_time", "tokens_per_second"}


def whole_and_resumed(worker, case, model, directory, *, kill_at, saved):
    """Where a run of this process is, and one that was killed and taken up again, each time in a process of its own."""
    whole, broken = directory / "whole", directory / "broken"
    script = Path(worker.__file__)
    worker.main(case, str(model), str(whole), 0)
    done = run_script(script, case, model, broken, kill_at)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (broken / "model").exists() and (broken / "checkpoints" / f"step_{saved:08}").is_dir()
    done = run_script(script, case, model, broken, 0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(broken) == numbers(whole) and [n["step"] for n in numbers(broken)] == list(range(1, 2 * saved + 1))
    return whole, broken


def numbers(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS and "seconds" not in k} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_kill_and_resume_is_exact(kind, tiny_model_dir, tmp_path):
    whole, broken = whole_and_resumed(resume_worker, kind, tiny_model_dir, tmp_path, kill_at=8, saved=5)
    weights = "adapter_model.safetensors" if kind == "sft" else "model.safetensors"
    assert (broken / "model" / weights).read_bytes() == (whole / "model" / weights).read_bytes()
    last = Path("checkpoints/step_00000010/optimizer.safetensors")
    assert (broken / last).read_bytes() == (whole / last).read_bytes()
    if kind == "grpo":
        samples = [sorted(p.name for p in (d / "samples").iterdir()) for d in (whole, broken)]
        assert samples[0] == samples[1] and len(samples[0]) == 10
        name = "samples/step_00000007.jsonl"
        assert timeless(whole / name) == timeless(broken / name)


def timeless(path):
    """The samples without what the clock says of them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "milliseconds"} for row in rows]
