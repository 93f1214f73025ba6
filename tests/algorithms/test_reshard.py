"""A run goes on under another number of processes and another sharding: the same data, and the same numbers but for rounding."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from llmrl.train.checkpoint import verify
from tests.algorithms import reshard_worker
from tests.processes import run_script

pytestmark = pytest.mark.slow


def run(strategy, processes, kind, model, out, steps, start="auto"):
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install 'llmrl[deepspeed]')")
    script = Path(reshard_worker.__file__)
    done = run_script(script, strategy, kind, model, out, steps, start, processes=processes, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "found.json").read_text())


def close(found, expected):
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-6)
        assert norm == pytest.approx(wanted_norm, rel=2e-5)


@pytest.mark.parametrize(
    ("kind", "strategy", "processes"),
    [("sft", "fsdp2", 2), ("sft", "zero3", 2), ("dpo", "fsdp2-lean", 3), ("ppo", "fsdp2", 2), ("ppo", "zero2", 2)],
)
def test_there_and_back(kind, strategy, processes, tiny_model_dir, tmp_path):
    alone = run("ddp", 1, kind, tiny_model_dir, tmp_path / "alone", 6)
    sharded = tmp_path / "sharded"
    close(run(strategy, processes, kind, tiny_model_dir, sharded, 3), alone[:3])
    checkpoint = sharded / "checkpoints" / "step_00000003"
    assert verify(checkpoint) == ""
    files = sorted(checkpoint.glob("optimizer_*.safetensors"))
    assert [f.name for f in files] == [f"optimizer_{r:05d}_of_{processes:05d}.safetensors" for r in range(processes)]
    assert not {p.suffix for p in checkpoint.rglob("*")} & {".bin", ".pt", ".pkl", ".distcp"}, "nothing is pickled"
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert len(tensors.keys())
    # The same way, in one process, and from one process the other way.
    close(run(strategy, processes, kind, tiny_model_dir, sharded, 6), alone)
    close(run("ddp", 1, kind, tiny_model_dir, tmp_path / "home", 6, checkpoint), alone[3:])
    start = tmp_path / "alone" / "checkpoints" / "step_00000003"
    close(run(strategy, processes, kind, tiny_model_dir, tmp_path / "out", 6, start), alone[3:])
