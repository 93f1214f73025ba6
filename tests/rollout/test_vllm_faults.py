"""What servers can do wrong, one test each: either every group comes exactly once, or the call ends soon with an error that helps."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch

from llmrl.errors import ConfigError, RolloutError, SyncError
from llmrl.models.weights import ModelWeights
from llmrl.rollout import vllm_fleet
from llmrl.rollout.vllm_client import ServerRefused
from llmrl.types import Sampling
from tests.rollout.fake_vllm import GENERATE, FakeVLLM
from tests.rollout.test_vllm_engine import PROMPTS, PlainWeights, engine_of, logprobs_of, same

SAMPLING = Sampling(6, seed=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(vllm_fleet, "_POLL", 0.03)
    monkeypatch.setattr(vllm_fleet, "_REST", 0.03)
    monkeypatch.setattr(vllm_fleet, "_WATCH", 0.05)
    monkeypatch.setattr(vllm_fleet, "_PROGRESS", 0.1)
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "secret")


@pytest.fixture(scope="module")
def expected(tiny_model_dir, tiny_tokenizer, tmp_path_factory):
    """The groups of a server without a fault."""
    with pytest.MonkeyPatch.context() as patch, FakeVLLM(tiny_model_dir) as fake:
        patch.setenv("LLMRL_SERVER_TOKEN", "secret")
        with engine_of([fake], tiny_tokenizer, tmp_path_factory.mktemp("expected")) as engine:
            engine.sync_weights(weights(fake), 1)
            return engine.generate(PROMPTS, 2, SAMPLING)


def weights(fake):
    return PlainWeights(fake.model, noise=0.05)


def collect(engine):
    """The groups of a call, each of which must have streamed exactly once."""
    seen = []
    groups = engine.generate(PROMPTS, 2, SAMPLING, lambda place, group: seen.append((place, group)))
    assert sorted(place for place, _ in seen) == list(range(len(PROMPTS)))
    assert all(groups[place] is group for place, group in seen)
    return groups


BROKEN_ANSWERS = [
    "500", "503", "drop", "cut", "malformed", "not_an_object", "fewer_tokens", "fewer_logprobs", "no_logprobs", "missing_choice",
    "same_index", "wrong_finish", "abort", "bad_token", "other_token", "nan", "positive", "no_versions", "short_versions",
    "too_many_tokens", "empty",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "count"), [*((kind, 1) for kind in BROKEN_ANSWERS), ("500", 2), ("drop", 2), ("fewer_tokens", 2)]
)
def test_a_group_whose_answer_is_broken_is_sampled_again(fakes, expected, tiny_tokenizer, tmp_path, kind, count):
    with engine_of(fakes[:count], tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fakes[0]), 1)
        fakes[0].fail(GENERATE, kind)
        same(expected, collect(engine))
        metrics = engine.pop_metrics()
        assert metrics["rollout/resent"] == metrics["rollout/server_faults"] == 1
        assert sum(fake.count(GENERATE) for fake in fakes) == len(PROMPTS) + 1
        engine.verify()


@pytest.mark.parametrize("kind", ["500", "malformed", "fewer_tokens", "nan", "abort", "drop"])
def test_a_fault_that_stays_ends_the_call_with_what_happened_and_where(fake, tiny_tokenizer, tmp_path, kind):
    fake.fail(GENERATE, kind, times=None)
    start = time.monotonic()
    wanted = pytest.raises(RolloutError, match=r"failed 4 times.*the same command then continues")
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine, wanted as caught:
        collect(engine)
    assert fake.url in str(caught.value) and time.monotonic() - start < 20


def test_one_broken_server_of_two_costs_time_and_nothing_else(fakes, expected, tiny_tokenizer, tmp_path):
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fakes[0]), 1)
        fakes[0].fail(GENERATE, "500", times=None)
        same(expected, collect(engine))


def test_a_late_answer_is_waited_for(fake, expected, tiny_tokenizer, tmp_path):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fake), 1)
        fake.fail(GENERATE, "late", seconds=0.5)
        same(expected, collect(engine))
        assert engine.pop_metrics()["rollout/resent"] == 0


@pytest.mark.parametrize("count", [1, 2], ids=["one-server", "two-servers"])
def test_a_request_that_hangs_is_given_up_and_sent_again(fakes, expected, tiny_tokenizer, tmp_path, count):
    with engine_of(fakes[:count], tiny_tokenizer, tmp_path, request_timeout=1.0) as engine:
        engine.sync_weights(weights(fakes[0]), 1)
        fakes[0].fail(GENERATE, "hang", seconds=60)
        same(expected, collect(engine))
        assert engine.pop_metrics()["rollout/resent"] == 1
    deadline = time.monotonic() + 20
    while not fakes[0].aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fakes[0].aborted == 1  # the server need not compute for nobody


def test_a_server_that_is_not_up_yet_is_waited_for_with_progress(fakes, tiny_tokenizer, tmp_path):
    fakes[1].kill()
    threading.Timer(1.5, fakes[1].start).start()
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        assert any(fakes[1].url in line and "of 30 s" in line for line in engine.lines)
        assert not any(fakes[0].url in line for line in engine.lines)
        collect(engine)
    assert all(fake.count(GENERATE) for fake in fakes)


def test_a_server_that_never_comes_up_ends_the_wait_in_time(fake, tiny_tokenizer, tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(RolloutError, match=r"did not come up in 0\.5 s.*llmrl serve") as caught:
        engine_of([fake, url], tiny_tokenizer, tmp_path, start_timeout=0.5).__enter__()
    assert url in str(caught.value) and fake.url not in str(caught.value) and time.monotonic() - start < 20


def test_of_two_servers_one_dies_and_the_other_does_its_work(fakes, expected, tiny_tokenizer, tmp_path):
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fakes[0]), 1)
        fakes[0].fail(GENERATE, "die")
        same(expected, collect(engine))
        engine.verify()
        report = engine.sync_weights(weights(fakes[1]), 2)
        assert report.version == 2 and engine.pop_metrics()["rollout/servers_up"] == 1
        assert {r.completion.version for g in engine.generate(PROMPTS, 1, SAMPLING) for r in g} == {2}


def test_a_server_that_dies_alone_is_waited_for_and_given_its_weights(fake, expected, tiny_tokenizer, tmp_path):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fake), 1)
        fake.fail(GENERATE, "die")
        threading.Timer(0.8, fake.restart).start()
        groups = collect(engine)
        same(expected, groups)
        assert {r.completion.version for g in groups for r in g} == {1}
        assert any("no generation server is up" in line for line in engine.lines)
        assert any("sending it the weights" in line for line in engine.lines)
        engine.verify()


def drain_at_the_third_token(fake):
    def drain(t):
        if t == 3:
            fake.on_token = None
            threading.Thread(target=fake.drain).start()

    fake.seconds_per_token, fake.on_token = 0.01, drain


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_that_is_being_stopped_is_not_waited_for(fakes, expected, tiny_tokenizer, tmp_path, count):
    with engine_of(fakes[:count], tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fakes[0]), 1)
        drain_at_the_third_token(fakes[0])
        if count == 1:
            threading.Timer(1.0, fakes[0].restart).start()
        start = time.monotonic()
        same(expected, collect(engine))
        assert time.monotonic() - start < 20
        assert fakes[0]._draining.is_set() == (count == 2)
        metrics = engine.pop_metrics()
        assert metrics["rollout/resent"] >= 1 and metrics["rollout/server_faults"] >= 1
        engine.verify()
        for thread in threading.enumerate():
            if thread.name == "llmrl-request":
                thread.join(20)
                assert not thread.is_alive()


def test_a_server_that_is_being_stopped_in_a_sync_is_not_waited_for(fakes, expected, tiny_tokenizer, tmp_path):
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        fakes[0].fail("/update_weights", "late", seconds=0.5)
        threading.Timer(0.3, fakes[0].drain).start()
        start = time.monotonic()
        engine.sync_weights(weights(fakes[0]), 1)
        same(expected, collect(engine))
        assert time.monotonic() - start < 20 and engine.pop_metrics()["rollout/servers_up"] == 1


def test_a_server_that_answers_nothing_for_long_is_given_up(fakes, expected, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_fleet, "_PATIENCE", 0.1)
    monkeypatch.setattr(vllm_fleet, "_SILENCE", 0.5)
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fakes[0]), 1)
        fakes[0].fail("/health", "hang", times=None, seconds=60)
        fakes[0].fail(GENERATE, "hang", seconds=60)
        same(expected, collect(engine))
        assert engine.pop_metrics()["rollout/resent"] >= 1


def test_a_busy_server_may_answer_late(fakes, expected, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_fleet, "_PATIENCE", 0.1)
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fakes[0]), 1)
        fakes[0].fail("/health", "hang", times=3, seconds=60)
        fakes[0].fail("/health", "drop")
        fakes[0].fail(GENERATE, "late", seconds=1)
        same(expected, collect(engine))
        assert engine.pop_metrics()["rollout/server_faults"] == 0


def test_a_server_that_restarted_unnoticed_is_never_sampled_with_its_first_weights(
    fake, expected, tiny_tokenizer, tmp_path
):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fake), 1)
        fake.restart()
        engine.verify()  # it is no fault of the sync
        same(expected, collect(engine))


def test_a_server_that_comes_back_with_another_model_is_refused(fake, tiny_tokenizer, tmp_path):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fake), 1)
        fake.overrides["num_hidden_layers"] = 3
        fake.restart()
        with pytest.raises(ConfigError, match="another model"):
            collect(engine)


def test_when_all_servers_are_gone_the_call_ends_in_time(fakes, tiny_tokenizer, tmp_path):
    with engine_of(fakes, tiny_tokenizer, tmp_path, start_timeout=1.0) as engine:
        engine.sync_weights(weights(fakes[0]), 1)
        for fake in fakes:
            fake.kill()
        start = time.monotonic()
        with pytest.raises(
            RolloutError,
            match=r"No generation server came back in 1 s \(rollout.start_timeout\): .*\. Start .*the same command",
        ) as caught:
            collect(engine)
        assert 1 <= time.monotonic() - start < 20
        assert all(fake.url in str(caught.value) for fake in fakes)
        start = time.monotonic()
        with pytest.raises(RolloutError, match="No generation server came back"):
            engine.sync_weights(weights(fakes[0]), 2)
        assert time.monotonic() - start < 20


def test_a_token_that_is_refused_later_stops_at_once(fake, tiny_tokenizer, tmp_path):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        fake.token = "changed"
        start = time.monotonic()
        with pytest.raises(ServerRefused, match="did not take the token"):
            collect(engine)
        assert time.monotonic() - start < 20


@pytest.mark.parametrize("route", ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_a_server_that_fails_in_a_sync_gets_the_weights_before_it_is_used(
    fakes, expected, tiny_tokenizer, tmp_path, route
):
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        fakes[0].fail(route, "500", times=2)
        engine.sync_weights(weights(fakes[0]), 1)
        same(expected, collect(engine))
        engine.probe((5, 6, 7), SAMPLING)
        deadline = time.monotonic() + 20
        while len(engine._fleet.up()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(engine.probe((5, 6, 7), SAMPLING)) == 2
        engine.verify()


def test_the_only_server_dies_in_a_sync_and_comes_back(fake, expected, tiny_tokenizer, tmp_path):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        fake.fail("/update_weights", "drop", times=2)
        engine.sync_weights(weights(fake), 1)
        same(expected, collect(engine))


@pytest.mark.parametrize("fault", ["drop_update", "lose_tensor", "half_update"])
def test_an_update_that_was_not_done_is_found_by_the_sync(fake, tiny_tokenizer, tmp_path, fault):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        fake.weight_fault = fault
        with pytest.raises(SyncError, match=fake.url):
            engine.sync_weights(weights(fake), 1)


def test_stale_weights_that_come_back_are_found_by_verify(fake, tiny_tokenizer, tmp_path):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(PlainWeights(fake.model, noise=0.05, seed=1), 1)
        fake.weight_fault = "restore_stale"
        engine.sync_weights(PlainWeights(fake.model, noise=0.05, seed=2), 2)
        engine.verify()
        collect(engine)
        with pytest.raises(SyncError, match=fake.url):
            engine.verify()


@pytest.mark.parametrize(
    ("label", "message"),
    [("other-run:9", "Another training run"), ("{run}:1", "An update was lost or undone")],
)
def test_completions_of_other_weights_are_refused(fake, tiny_tokenizer, tmp_path, label, message):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(weights(fake), 2)
        fake.label = label.format(run=engine.run_id)
        with pytest.raises(SyncError, match=message):
            collect(engine)


def test_a_probe_leaves_out_a_server_that_fails(fakes, tiny_tokenizer, tmp_path):
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        fakes[0].kill()
        assert len(engine.probe((5, 6, 7), SAMPLING)) == 1
        assert engine.pop_metrics()["rollout/servers_up"] == 1


def test_adapters_are_asked_for_by_name_and_sent_again_to_a_server_that_restarted(
    fake, tiny_model_dir, tiny_tokenizer, tmp_path
):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir).float()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)).eval()
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        engine.sync_weights(ModelWeights(model), 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(-2)
        engine.sync_weights(ModelWeights(model), 2)
        before = collect(engine)
        engine.verify()
        fake.restart()
        same(before, collect(engine))
        names = {b["model"] for r, b in fake.requests if r == GENERATE}
    assert names == {f"{engine.run_id}:2"}
    for prompt, group in zip(PROMPTS, before):
        for r in group:
            assert r.completion.version == 2
            expected = logprobs_of(model, prompt, r.completion, 1.0)
            torch.testing.assert_close(torch.tensor(r.completion.sampled_logprobs), expected, atol=1e-5, rtol=0)
