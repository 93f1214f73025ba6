"""Trainers whose rollouts come from generation servers: the fake ones, with faults to order, and (slow) real vLLM."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from llmrl.algorithms.dpo import DPOTrainer
from llmrl.algorithms.grpo import GRPOTrainer
from llmrl.algorithms.ppo import PPOTrainer
from llmrl.config.dpo import DPOConfig
from llmrl.config.grpo import GRPOConfig
from llmrl.config.ppo import PPOConfig
from llmrl.errors import ConfigError, DivergenceError, RewardError, RolloutError, SyncError
from tests.rollout.fake_vllm import GENERATE, FakeVLLM

ROWS = [{"prompt": text} for text in ("the answer", "is", "because", "three times", "four", "twelve is")]
KINDS = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig), "dpo": (DPOTrainer, DPOConfig)}


def letters(completions, **kwargs):
    return [float(sum("a" <= x <= "z" for x in c)) for c in completions]


class At:
    """Callback: does something once a step has ended."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, trainer, step, metrics):
        if step == self.step:
            self.action()


@pytest.fixture
def fake(tiny_model_dir, monkeypatch):
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "secret")
    with FakeVLLM(tiny_model_dir) as server:
        yield server


def run(model, out, servers, *, kind="grpo", callbacks=(), reward=letters, eval_rows=None, rollout=None, **settings):
    trainer_class, config_class = KINDS[kind]
    urls = [server.url for server in servers]
    defaults = {
        "batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "rollout": {"engine": "vllm_server", "urls": urls, "start_timeout": 5, "request_timeout": 5, **(rollout or {})}
        if urls
        else {},
    }
    config = config_class(model_name_or_path=str(model), output_dir=str(out), **{**defaults, **settings})
    trainer = trainer_class(
        config, train_dataset=ROWS, eval_dataset=eval_rows, reward_funcs=reward, callbacks=list(callbacks)
    )
    trainer.train()
    return lines(out)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_sampled_with_the_weights_of_that_step(kind, fake, tiny_model_dir, tmp_path):
    metrics = run(tiny_model_dir, tmp_path, [fake], kind=kind)
    assert len(metrics) == 4 and fake.count("/finish_weight_update") == 4
    for line in metrics:
        assert line["sampling/canary_gap"] < 1e-4 and line["sampling/sampling_logp_difference/mean"] < 1e-4
        assert line["sync/tensors"] == 26 and line["sync/bytes"] > 1e5
    assert max(line["grad_norm"] for line in metrics) > 0
    labels = [body["weight_version"] for route, body in fake.requests if route == "/finish_weight_update"]
    assert [label.rsplit(":", 1)[1] for label in labels] == ["0", "1", "2", "3"]
    assert len({label.rsplit(":", 1)[0] for label in labels}) == 1


@pytest.mark.parametrize(
    "fault",
    ["drop_update", "lose_tensor", "half_update", "restore_stale", "stale_prefix", "wrong_label", "wrong_model"],
)
def test_a_server_without_the_weights_stops_the_run_at_that_step(fault, fake, tiny_model_dir, tmp_path):
    def break_it():
        if fault == "wrong_model":
            fake.become(other)
        fake.weight_fault = fault

    other = tmp_path / "other"
    if fault == "wrong_model":
        _other_model(tiny_model_dir, other)
    with pytest.raises((SyncError, DivergenceError)) as caught:
        # A cache that forgets to forget shows once it has something old to give: in the rollouts, so no checkpoint is made for it.
        step, settings = (1, {"save_steps": 1}) if fault == "stale_prefix" else (2, {})
        run(tiny_model_dir, tmp_path / "run", [fake], callbacks=[At(step, break_it)], **settings)
    assert len(str(caught.value)) > 100  # what was found, why, what to do
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]  # nothing was trained on such rollouts
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
    fake.weight_fault = None
    fake.become(tiny_model_dir)
    metrics = run(tiny_model_dir, tmp_path / "run", [fake])
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]


def _other_model(model, path):
    """The same shapes, other rotary frequencies: every tensor can be loaded, and every number is wrong."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 7.0}
    AutoModelForCausalLM.from_config(config).save_pretrained(path)


def test_a_wrong_model_from_the_start_is_found_before_the_first_step(fake, tiny_model_dir, tmp_path):
    fake.overrides["vocab_size"] = 1000
    with pytest.raises(ConfigError, match="1000"):
        run(tiny_model_dir, tmp_path, [fake])


def test_a_server_that_dies_in_the_middle_costs_nothing(fake, tiny_model_dir, tmp_path):
    seen = []

    def reward(completions, prompts, trainer_state, **kwargs):
        seen.append((trainer_state.global_step, Counter(prompts)))
        return letters(completions)

    plain = run(tiny_model_dir, tmp_path / "plain", [fake], reward=reward)
    undisturbed, seen = seen, []
    with FakeVLLM(tiny_model_dir) as second:
        dies = At(2, lambda: second.fail(GENERATE, "die"))
        metrics = run(tiny_model_dir, tmp_path / "run", [fake, second], reward=reward, callbacks=[dies])
        assert second.count(GENERATE) > 0
    assert seen == undisturbed  # the same prompts at the same steps, each completion scored once
    assert [line["num_tokens"] > 0 for line in metrics] == [True] * 4 and len(plain) == 4
    assert all(line["sampling/canary_gap"] < 1e-4 for line in metrics)


def test_no_server_left_stops_in_bounded_time_and_the_run_continues_later(fake, tiny_model_dir, tmp_path):
    settings = {"rollout": {"start_timeout": 1}}
    with pytest.raises(RolloutError, match=r"127\.0\.0\.1"):
        run(tiny_model_dir, tmp_path, [fake], callbacks=[At(3, fake.kill)], **settings)
    assert (tmp_path / "checkpoints" / "step_00000003").is_dir()
    drawn = []

    def reward(completions, prompts, **kwargs):
        drawn.append(sorted(prompts))
        return letters(completions)

    fake.restart()
    metrics = run(tiny_model_dir, tmp_path, [fake], reward=reward)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    whole = []

    def watch(completions, prompts, **kwargs):
        whole.append(sorted(prompts))
        return letters(completions)

    run(tiny_model_dir, tmp_path / "whole", [fake], reward=watch)
    assert drawn == whole[3:]


def test_a_reward_that_fails_costs_no_step(fake, tiny_model_dir, tmp_path):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 3:
            raise ValueError("no such thing")
        return letters(completions)

    with pytest.raises(RewardError):
        run(tiny_model_dir, tmp_path, [fake], reward=reward)
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir()
    assert [line["step"] for line in run(tiny_model_dir, tmp_path, [fake])] == [1, 2, 3, 4]


def test_evaluation_samples_with_the_newest_weights(fake, tiny_model_dir, tmp_path):
    metrics = run(tiny_model_dir, tmp_path, [fake], eval_rows=ROWS[:2], eval_steps=2)
    assert "eval_reward" in metrics[1] and "eval_reward" in metrics[3] and "eval_reward" not in metrics[0]
    salts = [body["cache_salt"].rsplit(":", 1)[1] for route, body in fake.requests if route == GENERATE]
    assert salts == sorted(salts) and salts[-1] == "4" and fake.count("/finish_weight_update") == 5


def test_rollouts_one_step_ahead(fake, tiny_model_dir, tmp_path):
    drawn = []

    def reward(completions, prompts, trainer_state, **kwargs):
        drawn.append((trainer_state.global_step, sorted(prompts)))
        return letters(completions)

    ahead = run(tiny_model_dir, tmp_path / "a", [fake], rollout={"max_staleness": 1}, reward=reward, max_steps=6)
    assert [line["step"] for line in ahead] == list(range(1, 7))
    assert ahead[0]["rollout/staleness/max"] == 0
    assert 1 <= max(line["rollout/staleness/max"] for line in ahead) <= 1
    assert all(0 < line["sampling/ess"] <= 1 + 1e-6 and line["sampling/canary_gap"] < 1e-4 for line in ahead)
    in_order, drawn = sorted(drawn), []
    run(tiny_model_dir, tmp_path / "b", [fake], reward=reward, max_steps=6)
    assert in_order == drawn  # the same prompts at the same steps

    drawn.clear()
    stops = At(3, lambda: fake.fail(GENERATE, "401", times=None))
    with pytest.raises(RolloutError):
        run(tiny_model_dir, tmp_path / "c", [fake], rollout={"max_staleness": 1}, callbacks=[stops], max_steps=6)
    fake.faults.clear()
    first = int(max((tmp_path / "c" / "checkpoints").glob("step_*")).name[5:])
    assert first >= 3
    run(tiny_model_dir, tmp_path / "c", [fake], rollout={"max_staleness": 1}, reward=reward, max_steps=6)
    assert sorted(drawn) == in_order[first:]


def test_a_lora_adapter_travels_alone(fake, tiny_model_dir, tmp_path):
    metrics = run(tiny_model_dir, tmp_path, [fake], lora={"r": 4, "lora_alpha": 16}, learning_rate=3e-2)
    assert all(line["sampling/canary_gap"] < 1e-4 for line in metrics)
    assert fake.count("/v1/load_lora_adapter") == 4 and fake.count("/finish_weight_update") <= 1
    assert metrics[-1]["sync/bytes"] < 5e4


def test_same_rewards_as_the_local_engine(fake, tiny_model_dir, tmp_path):
    """At learning rate 0 both sample from the same distribution: the means differ by sampling noise alone."""
    settings = {"learning_rate": 0.0, "max_steps": 6, "num_generations": 16}
    a = run(tiny_model_dir, tmp_path / "server", [fake], **settings)
    b = run(tiny_model_dir, tmp_path / "local", [], **settings)
    mean = [sum(line["reward"] for line in x) / len(x) for x in (a, b)]
    std = math.sqrt(sum(line["reward_std"] ** 2 for line in a + b) / 12)
    assert std > 0 and abs(mean[0] - mean[1]) < 4 * std * math.sqrt(2 / (6 * 4 * 16))
