"""Six steps equal three, kill -9, resume, three: policy, critic, optimizer, controller and running mean, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.algorithms import ppo_resume_worker
from tests.algorithms.test_resume import whole_and_resumed

LAST = Path("checkpoints/step_00000006")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "state"),
    [
        ("shared", "kl_controller"),
        ("separate", "kl_controller"),
        ("lora", "kl_controller"),
        ("reinforce", "running_mean"),
    ],
)
def test_kill_and_resume_is_exact(case, state, tiny_model_dir, tmp_path):
    whole, broken = whole_and_resumed(ppo_resume_worker, case, tiny_model_dir, tmp_path, kill_at=5, saved=3)
    files = sorted(p.relative_to(whole) for p in (whole / LAST).rglob("*.safetensors"))
    assert len(files) == (2 if case == "reinforce" else 3)  # model, optimizer and critic
    for file in files:
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    saved = [json.loads((d / LAST / "state.json").read_text())["stateful"] for d in (whole, broken)]
    assert saved[0] == saved[1] and set(saved[0][state].values()) - {0.0, 0.05, 1.0}  # it has moved
