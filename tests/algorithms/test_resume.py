"""Ten steps equal five, kill -9, resume, five: bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = {"step_time", "tokens_per_second"}


def run(kind, model, out, kill_at=0):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        str(ROOT / "tests/algorithms/resume_worker.py"),
        kind,
        str(model),
        str(out),
        str(kill_at),
    ]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def numbers(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS and "seconds" not in k} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_kill_and_resume_is_exact(kind, tiny_model_dir, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(kind, tiny_model_dir, whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(kind, tiny_model_dir, broken, kill_at=8).returncode == -signal.SIGKILL
    assert not (broken / "model").exists() and (broken / "checkpoints" / "step_00000005").is_dir()
    done = run(kind, tiny_model_dir, broken)
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(broken) == numbers(whole) and [n["step"] for n in numbers(broken)] == list(range(1, 11))
    weights = "adapter_model.safetensors" if kind == "sft" else "model.safetensors"
    assert (broken / "model" / weights).read_bytes() == (whole / "model" / weights).read_bytes()
    last = Path("checkpoints/step_00000010/optimizer.safetensors")
    assert (broken / last).read_bytes() == (whole / last).read_bytes()
    if kind == "grpo":
        samples = [sorted(p.name for p in (d / "samples").iterdir()) for d in (whole, broken)]
        assert samples[0] == samples[1] and len(samples[0]) == 10
        name = "samples/step_00000007.jsonl"
        assert (whole / name).read_text() == (broken / name).read_text()
