"""`llmrl doctor`: passes where engine and trainer agree, and says which of the things that it certifies does not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from llmrl.cli.main import main
from llmrl.rollout.vllm_client import VLLMServer
from tests.rollout.fake_vllm import FakeVLLM

ROWS = [{"prompt": text, "answer": str(i)} for i, text in enumerate(("the answer", "is", "because", "three"))]


@pytest.fixture
def recipe(tiny_model_dir, tmp_path):
    """Writes a recipe with the given rollout settings; returns its path."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "letters.py").write_text(
        "def letters(completions, **kwargs):\n    return [float(sum('a' <= x <= 'z' for x in c)) for c in completions]\n"
    )

    def write(rollout, **settings):
        values = {
            "model_name_or_path": str(tiny_model_dir), "output_dir": str(tmp_path / "run"), "dataset": str(tmp_path / "rows.jsonl"),
            "rewards": [{"function": f"{tmp_path / 'letters.py'}:letters"}], "batch_size": 2, "num_generations": 4,
            "max_completion_length": 8, "learning_rate": 1e-2, "rollout": rollout, **settings,
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.fixture
def fake(tiny_model_dir, monkeypatch):
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "secret")
    with FakeVLLM(tiny_model_dir) as server:
        yield server


def test_servers_see_its_weights_where_they_see_those_of_the_run(recipe, fake, tmp_path, monkeypatch):
    monkeypatch.setattr("llmrl.rollout.weight_sync.is_loopback", lambda url: False)  # else in shared memory
    seen = []
    update = VLLMServer.update
    monkeypatch.setattr(VLLMServer, "update", lambda self, info: (seen.extend(info["files"]), update(self, info)))
    assert main(["doctor", "grpo", "--config", recipe(server(fake))]) == 0
    assert seen and all(Path(file).is_relative_to(tmp_path) for file in seen)
    assert not list(tmp_path.glob("llmrl-doctor-*"))


def server(fake, **more):
    return {"engine": "vllm_server", "urls": [fake.url], "start_timeout": 3, "request_timeout": 3, **more}


@pytest.mark.parametrize("kind", ["grpo", "ppo", "dpo"])
def test_the_local_engine_passes(kind, recipe, tmp_path, capsys):
    assert main(["doctor", kind, "--config", recipe({})]) == 0
    out = capsys.readouterr().out
    assert "processes" in out and "log-probs of rollouts" in out and "FAIL" not in out
    assert not (tmp_path / "run").exists()  # the run's own directory is untouched


@pytest.mark.parametrize("more", [{}, {"max_staleness": 1}])
def test_a_server_passes(more, recipe, fake, capsys):
    assert main(["doctor", "grpo", "--config", recipe(server(fake, **more))]) == 0
    out = capsys.readouterr().out
    assert fake.url in out and "log-probs of fixed tokens" in out and "weight sync" in out


@pytest.mark.parametrize("fault", ["drop_update", "lose_tensor", "half_update", "restore_stale", "wrong_label"])
def test_each_fault_of_a_server_fails(fault, recipe, fake, tmp_path, capsys):
    """At learning rate 0 all versions are equal, so the server begins with other weights than the trainer. (A stale prefix cache needs weights
    that change: tests/algorithms/test_server_runs.py.)"""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(123)  # a seed of its own: the tiny model is what seed 0 gives
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(fake.model_dir))
    other.save_pretrained(tmp_path / "other")
    fake.become(tmp_path / "other")
    fake.weight_fault = fault
    assert main(["doctor", "grpo", "--config", recipe(server(fake))]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_what_can_not_be_reached_fails_in_bounded_time(recipe, fake, capsys):
    fake.kill()
    assert main(["doctor", "grpo", "--config", recipe(server(fake, start_timeout=1))]) == 1
    assert fake.url in capsys.readouterr().out.replace("\n", "")


def test_another_model_and_a_wrong_token_fail(recipe, fake, capsys, monkeypatch):
    fake.overrides["hidden_size"] = 4096
    assert main(["doctor", "grpo", "--config", recipe(server(fake))]) == 1
    assert "4096" in capsys.readouterr().out
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "other")
    assert main(["doctor", "grpo", "--config", recipe(server(fake))]) == 1
    assert "token" in capsys.readouterr().out


def test_an_engine_that_drifts_fails(recipe, capsys, monkeypatch):
    """A gap that grows although nothing is learnt is an engine's state that drifts, also below the bound."""
    from llmrl.rollout.local import _Decoder

    original = _Decoder._record

    def drift(self, row, token, logprob):
        original(self, row, token, logprob - 2e-4 * self.engine.version)

    monkeypatch.setattr(_Decoder, "_record", drift)
    assert main(["doctor", "grpo", "--config", recipe({})]) == 1
    assert "it grows" in capsys.readouterr().out.replace("\n", " ")


def test_kinds_that_sample_nothing(recipe, capsys):
    assert main(["doctor", "sft"]) == 2 and "llmrl check" in capsys.readouterr().err
    assert main(["doctor", "--help"]) == 0 and "learning rate 0" in capsys.readouterr().out
