"""What a run against generation servers says while it is set up, and what it refuses there."""

from __future__ import annotations

import threading

import pytest

from llmrl.errors import ConfigError
from tests.algorithms.test_server_runs import run
from tests.rollout.fake_vllm import FakeVLLM


@pytest.fixture
def fake(tiny_model_dir, monkeypatch):
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "secret")
    with FakeVLLM(tiny_model_dir) as server:
        yield server


def test_a_run_says_which_server_it_waits_for(fake, tiny_model_dir, tmp_path, capsys):
    fake.kill()
    timer = threading.Timer(2.0, fake.restart)
    timer.start()
    run(tiny_model_dir, tmp_path, [fake], rollout={"start_timeout": 60}, max_steps=1)
    timer.join()
    assert f"grpo: waiting for {fake.url}: 0 s of 60 s" in capsys.readouterr().out


def test_a_server_that_takes_too_few_tokens_is_refused_before_the_first_step(fake, tiny_model_dir, tmp_path):
    fake.max_model_len = 9
    with pytest.raises(
        ConfigError, match=r"max_completion_length 8 make \d+ tokens.* take 9\. Start them with --max-model-len"
    ):
        run(tiny_model_dir, tmp_path, [fake])
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()
