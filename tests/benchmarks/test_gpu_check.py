"""The GPU check as far as a machine without a GPU can tell: its checks hold on the CPU in small shapes, and they can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmrl.train import records

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The modules of benchmarks/gpu, imported for a rehearsal."""
    import importlib

    monkeypatch.setenv("GPU_CHECK_REHEARSAL", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: importlib.import_module(f"gpu.{name}") for name in ("common", "references", "equalities", "speed")}
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu"]:
        del sys.modules[name]


def lines_of(output: str) -> dict[str, list[dict]]:
    """The JSON lines of each check."""
    found: dict[str, list[dict]] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            found.setdefault(entry.get("check", "end"), []).append(entry)
    return found


def rehearse(*checks: str) -> dict[str, list[dict]]:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--rehearse", *checks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return lines_of(done.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it does without a CUDA device")
def test_it_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu_check.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


@pytest.mark.slow
def test_equalities_and_references_hold_on_the_cpu():
    found = rehearse("attention", "head", "update", "packed_model", "sft_step", "grpo_step")
    assert found["end"] == [{"failed": []}]
    assert len(found["attention"]) == len(found["attention/shared_prompts"]) == 7
    assert {name.partition("/")[2] for name in found if name.startswith("update/")} >= {
        "float32", "microbatches", "one_document_at_a_time", "other_order", "offloaded", "checkpointed",
    }  # fmt: skip
    # On one thread of a CPU the same kernels on the same numbers give the same bits.
    assert found["update/checkpointed"][0]["gradient"] == 0.0


@pytest.mark.slow
def test_speed_and_sharding_run_on_the_cpu():
    found = rehearse("same_numbers", "speed", "savers", "trainers")
    assert found["end"] == [{"failed": []}]
    assert found["same_numbers/fsdp2"][0]["ok"] and found["same_numbers/fsdp2/grpo"][0]["ok"]
    assert {f"{what}/{kind}/{size}" for what in ("speed", "memory") for kind in ("sft", "dpo", "grpo") for size in ("0.5B", "1.5B")} <= (
        found.keys()
    )  # fmt: skip
    plain, checkpointed = (
        found[f"memory/sft/{name}"][0]["foreseen_mb"] for name in ("plain", "gradient_checkpointing")
    )
    assert checkpointed < plain
    assert {
        f"trainers/{kind}" for kind in ("sft", "reward", "dpo", "grpo", "ppo-shared", "ppo-separate")
    } <= found.keys()


def test_a_failing_check_is_said_and_ends_no_other(gpu, monkeypatch, capsys):
    common, equalities = gpu["common"], gpu["equalities"]
    monkeypatch.setattr(common, "FAILED", [])
    base = equalities.Result(2.0, torch.ones(4))
    equalities._compare("same", base, base, 1e-3)
    equalities._compare("wrong", equalities.Result(2.0, torch.tensor([1.0, 1.0, 1.0, 1.1])), base, 1e-3)
    equalities._compare("lost", equalities.Result(float("nan"), torch.ones(4)), base, 1e-3)
    assert common.FAILED == ["update/wrong", "update/lost"]
    assert [line["ok"] for entries in lines_of(capsys.readouterr().out).values() for line in entries] == [
        True, False, False,
    ]  # fmt: skip


def test_the_reference_of_attention_is_masked_as_documents_with_prefixes_are(gpu):
    """Against softmax over each token's own list of visible ones."""
    torch.manual_seed(0)
    lengths, prefixes, window = [3, 2, 4], ((0, 0), (0, 2), (5, 0)), 3
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    out = gpu["references"].written_out(q, k, v, lengths, window, prefixes)[0]
    seen = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 3], 4: [1, 3, 4], 5: [5], 6: [5, 6], 7: [5, 6, 7], 8: [6, 7, 8]}
    for token, visible in seen.items():
        for head in range(2):
            weights = torch.softmax(k[0, head, visible] @ q[0, head, token] / 2, 0)
            assert torch.allclose(out[token, head], weights @ v[0, head, visible])


def test_operations_of_a_shape(gpu):
    """Against the parameters of a model of that shape, and a count of pairs by hand."""
    common = gpu["common"]
    shape = common.Shape(hidden=32, intermediate=48, layers=3, heads=4, kv_heads=2, vocabulary=100)
    model = common.make_model(shape)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert shape.layer_parameters == matrices
    rows = common.examples([6, 4], 100)
    assert common.seen_pairs(rows) == (36 + 16) / 2
    flops = shape.flops(10, 4, 26.0)
    assert flops == 6 * (matrices * 10 + 32 * 100 * 4) + 12 * 3 * 32 * 26
    assert shape.flops(10, 4, 26.0, passes=4) == flops * 4 / 3
    full = common.QWEN["1.5B"]
    assert full.layer_parameters + full.hidden * full.vocabulary == pytest.approx(
        1.543e9, rel=1e-3
    )  # its model card: 1.54B


def test_versions_without_an_installation(monkeypatch):
    monkeypatch.setattr(records, "_PACKAGES", ("torch", "no-such-package"))
    versions = records.environment(torch.device("cpu"), 1)["versions"]
    assert versions["no-such-package"] == "not installed" and versions["torch"].startswith("2.")
