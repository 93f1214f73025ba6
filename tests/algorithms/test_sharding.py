"""All five trainers give the same numbers in one process and, in two, under DDP, FSDP2, ZeRO-2 and ZeRO-3."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.algorithms import sharding_worker
from tests.processes import run_script

pytestmark = pytest.mark.slow


def run(strategy, processes, model, out, budget, *kinds):
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed (pip install 'llmrl[deepspeed]')")
    done = run_script(
        Path(sharding_worker.__file__), strategy, model, out, budget, *kinds, processes=processes, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(tiny_model_dir, tmp_path_factory):
    """The numbers of one process, and where its models are."""
    out = tmp_path_factory.mktemp("alone")
    return run("ddp", 1, tiny_model_dir, out, 50), out


def same_numbers(found, expected, kinds=sharding_worker.KINDS, *, norm=1e-5):
    for kind in kinds:
        for (loss, length), (wanted_loss, wanted_length) in zip(found[kind], expected[kind], strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-6), kind
            assert length == pytest.approx(wanted_length, rel=norm), kind


def test_any_cut(tiny_model_dir, tmp_path, alone):
    same_numbers(run("ddp", 1, tiny_model_dir, tmp_path, 1000), alone[0])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes(strategy, tiny_model_dir, tmp_path, alone):
    expected, where = alone
    found = run(strategy, 2, tiny_model_dir, tmp_path, 60)
    same_numbers(found, expected)
    for kind in sharding_worker.KINDS:
        assert found[f"{kind} strategy"] == [strategy, 2]
        here, whole = found[f"{kind} parameters here"], expected[f"{kind} parameters here"]
        if strategy == "fsdp2":
            assert here <= 0.51 * whole
        elif strategy != "zero3":  # where what is small stays whole
            assert here == whole
    for kind in ("sft", "grpo"):
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(directory / kind / "saved").state_dict()
            for directory in (tmp_path, where)
        )
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("strategy", ["fsdp2-lean", "zero2-offload"])
def test_what_saves_memory_changes_nothing(strategy, tiny_model_dir, tmp_path, alone):
    kinds = ("sft", "ppo", "grpo_lora")
    same_numbers(run(strategy, 2, tiny_model_dir, tmp_path, 60, *kinds), alone[0], kinds)
