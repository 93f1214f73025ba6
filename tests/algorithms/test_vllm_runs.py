"""Trainers against real vLLM on the CPU: the same numbers as with the engine inside, whichever way the weights travel."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmrl.cli.main import main
from tests.algorithms.test_server_runs import KINDS, letters, lines
from tests.servers import require_vllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = [{"prompt": f"{a} + {b} = "} for a in range(4) for b in range(3)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory in which `llmrl serve` would have left the servers' tokens."""
    folder = tmp_path / "home"
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("LLMRL_SERVER_TOKEN", raising=False)

    def know(*servers):
        (folder / ".llmrl").mkdir(parents=True, exist_ok=True, mode=0o700)
        for server in servers:
            path = folder / ".llmrl" / f"token-{server.url.rsplit(':', 1)[1]}"
            path.touch(mode=0o600)
            path.write_text(server.token)
        return [server.url for server in servers]

    return know


def train(model, out, kind="grpo", *, rollout, eval_rows=None, **settings):
    trainer_class, config_class = KINDS[kind]
    defaults = {
        "batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 4,
        "learning_rate": 3e-3,
    }
    config = config_class(
        model_name_or_path=str(model),
        output_dir=str(out),
        rollout=rollout,
        **{**defaults, "temperature": 0.7, **settings},
    )
    trainer = trainer_class(config, train_dataset=ROWS, eval_dataset=eval_rows, reward_funcs=letters)
    trainer.train()
    return lines(out)


def in_step(metrics, steps=4):
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    for line in metrics:
        assert line["sampling/canary_gap"] < 1e-4
        assert line["sync/tensors"] == metrics[0]["sync/tensors"]
    assert any(line["grad_norm"] > 0 for line in metrics)


@pytest.mark.parametrize("kind", KINDS)
def test_one_server(kind, vllm_model, vllm_server, home, tmp_path):
    urls = home(vllm_server)
    metrics = train(vllm_model, tmp_path / "run", kind, rollout={"engine": "vllm_server", "urls": urls})
    in_step(metrics)
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in metrics)


def test_two_servers(vllm_model, vllm_server, second_vllm_server, home, tmp_path):
    urls = home(vllm_server, second_vllm_server)
    rollout = {"engine": "vllm_server", "urls": urls}
    metrics = train(vllm_model, tmp_path / "run", rollout=rollout, eval_rows=ROWS[:2], eval_steps=2)
    in_step(metrics)
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in metrics)
    assert "eval_reward" in metrics[3]


def test_an_adapter(vllm_model, vllm_server, home, tmp_path):
    settings = {"lora": {"r": 8, "lora_alpha": 16}, "learning_rate": 2e-2}
    rollout = {"engine": "vllm_server", "urls": home(vllm_server)}
    metrics = train(vllm_model, tmp_path / "run", rollout=rollout, **settings)
    assert all(line["sampling/canary_gap"] < 1e-4 for line in metrics)
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in metrics)
    assert metrics[1]["sync/bytes"] < 2e5 and metrics[-1]["kl"] > 1e-5


def test_one_step_ahead(vllm_model, vllm_server, home, tmp_path):
    rollout = {"engine": "vllm_server", "urls": home(vllm_server), "max_staleness": 1}
    metrics = train(vllm_model, tmp_path / "run", rollout=rollout, max_steps=8, max_completion_length=64)
    in_step(metrics, 8)
    assert 0 < max(line["rollout/staleness/max"] for line in metrics) <= 1
    assert all(0.3 < line["sampling/ess"] <= 1 + 1e-6 for line in metrics)


def test_the_same_rewards_as_the_local_engine(vllm_model, vllm_server, home, tmp_path):
    settings = {"learning_rate": 0.0, "max_steps": 6, "num_generations": 16}
    server = {"engine": "vllm_server", "urls": home(vllm_server)}
    a = train(vllm_model, tmp_path / "server", rollout=server, **settings)
    b = train(vllm_model, tmp_path / "local", rollout={}, **settings)
    mean = [sum(line["reward"] for line in x) / len(x) for x in (a, b)]
    std = math.sqrt(sum(line["reward_std"] ** 2 for line in a + b) / 12)
    assert std > 0 and abs(mean[0] - mean[1]) < 4 * std * math.sqrt(2 / (6 * 4 * 16))


def test_doctor(vllm_model, vllm_server, home, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {
        "model_name_or_path": str(vllm_model), "output_dir": str(tmp_path / "run"), "dataset": str(tmp_path / "rows.jsonl"),
        "rewards": [{"function": "soft_overlong", "args": {"max_completion_len": 12, "soft_punish_cache": 6}}],
        "batch_size": 4, "num_generations": 4, "max_completion_length": 12,
        "rollout": {"engine": "vllm_server", "urls": home(vllm_server)},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(values))
    assert main(["doctor", "grpo", "--config", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert out.count("pass") >= 6 and "FAIL" not in out


_COLOCATED = """
import sys
sys.path.insert(0, {root!r})
from tests.algorithms.test_vllm_runs import train
from pathlib import Path
train(Path({model!r}), Path({out!r}), rollout={{"engine": "vllm_colocate"}}, eval_rows=[{{"prompt": "1 + 1 = "}}], eval_steps=2)
"""


def test_colocated(vllm_model, tmp_path):
    """In a process of its own: vLLM in this one would leave its settings behind for other tests."""
    require_vllm()
    root = str(Path(__file__).resolve().parents[2])
    code = _COLOCATED.format(root=root, model=str(vllm_model), out=str(tmp_path / "run"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = lines(tmp_path / "run")
    in_step(metrics)
    assert all(line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in metrics)
    assert "eval_reward" in metrics[1]
