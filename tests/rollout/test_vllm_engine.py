"""The engine of generation servers: what it asks, what it makes of the answers, and how it spreads groups.

Most tests use a fake server with a real tiny model inside; those marked slow use vLLM itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from llmrl.config.rollout import RolloutSettings
from llmrl.errors import ConfigError, LLMRLError, RolloutError, SyncError
from llmrl.rollout import vllm_fleet
from llmrl.rollout.vllm_answers import Reader, Weights
from llmrl.rollout.vllm_client import ServerRefused
from llmrl.rollout.vllm_engine import VLLMServerEngine
from llmrl.types import Prompt, Sampling
from tests.rollout.fake_vllm import GENERATE

MODEL = {"model_type": "qwen2", "vocab_size": 384, "hidden_size": 48, "num_hidden_layers": 2}
STOPS = (2, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50)
PROMPTS = [Prompt(f"p{i}", (5 + i, 60 + i, 7, 100 + 3 * i), "text") for i in range(6)]


class PlainWeights:
    """The policy weights of a model without adapters; `noise` is added to every tensor."""

    adapter_rank = None

    def __init__(self, model, noise=0.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            name: p.detach() + noise * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()
        }

    def __iter__(self):
        return iter(self.tensors.items())

    def base(self):
        return iter(self)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(vllm_fleet, "_POLL", 0.03)
    monkeypatch.setattr(vllm_fleet, "_REST", 0.03)
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "secret")


@contextmanager
def engine_of(
    servers, tokenizer, directory, *, model=MODEL, stops=STOPS, rank=0, world_size=1, gather=None, **settings
):
    lines = []
    settings = {"request_timeout": 60.0, "start_timeout": 30.0, "transfer_dir": str(directory), **settings}
    engine = VLLMServerEngine(
        RolloutSettings(engine="vllm_server", urls=[getattr(s, "url", s) for s in servers], **settings),
        tokenizer,
        stop_token_ids=stops,
        model=model,
        output_dir=directory,
        rank=rank,
        world_size=world_size,
        gather=gather or (lambda value: [value]),
        progress=lines.append,
    )
    engine.lines = lines
    try:
        yield engine
    finally:
        engine.close()
        engine.close()


def logprobs_of(model, prompt, completion, temperature):
    """Under a plain forward pass of the model, in float32."""
    ids = torch.tensor([prompt.ids + completion.ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1] / (temperature or 1.0)
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt.ids) :, None]).squeeze(1)


def same(a, b):
    """Equal tokens; log-probs that agree up to the rounding of other batches."""
    for x, y in zip(a, b, strict=True):
        assert [r.completion.ids for r in x] == [r.completion.ids for r in y]
        for r, q in zip(x, y):
            assert r.completion.sampled_logprobs == pytest.approx(q.completion.sampled_logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_groups_come_in_order_with_the_log_probs_of_a_forward_pass(fakes, tiny_tokenizer, tmp_path, temperature):
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        groups = engine.generate(PROMPTS, 4, Sampling(12, temperature, seed=3, step=1))
    assert [g[0].prompt.id for g in groups] == [p.id for p in PROMPTS]
    reasons = set()
    for prompt, group in zip(PROMPTS, groups):
        assert [r.index for r in group] == [0, 1, 2, 3]
        assert len({r.completion.ids for r in group}) > 1
        for r in group:
            c = r.completion
            reasons.add(c.finish_reason)
            assert (c.ids[-1] in STOPS) == (c.finish_reason == "stop") and not set(c.ids[:-1]) & set(STOPS)
            assert c.finish_reason == "stop" or len(c.ids) == 12
            body = c.ids[:-1] if c.finish_reason == "stop" else c.ids
            assert c.text == tiny_tokenizer.decode(list(body), skip_special_tokens=True)
            expected = logprobs_of(fakes[0].model, prompt, c, temperature)
            torch.testing.assert_close(torch.tensor(c.sampled_logprobs), expected, atol=1e-5, rtol=0)
    assert reasons == {"stop", "length"}


def test_the_request_carries_all_that_makes_the_answer_trainable(fake, tiny_tokenizer, tmp_path):
    with engine_of([fake], tiny_tokenizer, tmp_path, stops=(2, 9)) as engine:
        engine.sync_weights(PlainWeights(fake.model), 4)
        engine.generate(PROMPTS[:1], 3, Sampling(5, 0.7, top_p=0.9, top_k=7, min_p=0.01))
        label = f"{engine.run_id}:4"
    body = next(b for r, b in fake.requests if r == GENERATE)
    params = body["sampling_params"]
    assert body["token_ids"] == list(PROMPTS[0].ids) and body["cache_salt"] == label and "model" not in body
    assert 0 <= params.pop("seed") < 2**62
    assert params == {
        "n": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.01, "max_tokens": 5, "logprobs": 0,
        "ignore_eos": True, "stop_token_ids": [2, 9], "detokenize": False,
    }  # fmt: skip


def test_completions_depend_on_seed_step_and_id_and_not_on_the_batch(fakes, tiny_tokenizer, tmp_path):
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        groups = engine.generate(PROMPTS, 3, Sampling(8, seed=3, step=1))
        same([groups[4], groups[1]], engine.generate([PROMPTS[4], PROMPTS[1]], 3, Sampling(8, seed=3, step=1)))
        twin = Prompt("p4#2", PROMPTS[4].ids, "text")
        others = [
            engine.generate([PROMPTS[4]], 3, Sampling(8, seed=4, step=1))[0],
            engine.generate([PROMPTS[4]], 3, Sampling(8, seed=3, step=2))[0],
            engine.generate([twin], 3, Sampling(8, seed=3, step=1))[0],
        ]
    for other in others:
        assert [r.completion.ids for r in other] != [r.completion.ids for r in groups[4]]


def test_greedy_groups_are_sampled_once(fake, tiny_tokenizer, tmp_path):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        (group,) = engine.generate(PROMPTS[:1], 3, Sampling(8, temperature=0))
        assert len({r.completion for r in group}) == 1 and [r.index for r in group] == [0, 1, 2]
        expected = logprobs_of(fake.model, PROMPTS[0], group[0].completion, 1.0)
    assert torch.tensor(group[0].completion.sampled_logprobs) == pytest.approx(expected, abs=1e-5)


def test_groups_stream_as_they_finish_one_at_a_time(fake, tiny_tokenizer, tmp_path):
    seen, at, inside = [], [], threading.Lock()

    def on_group(place, group):
        assert inside.acquire(blocking=False)
        seen.append((place, group))
        at.append(time.monotonic())
        time.sleep(0.01)
        inside.release()

    fake.fail(GENERATE, "late", seconds=1.5)  # the request that arrives first, of whichever group, is answered last
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine:
        groups = engine.generate(PROMPTS, 2, Sampling(4), on_group)
    assert sorted(place for place, _ in seen) == list(range(6)) and at[-1] - at[0] > 0.2
    assert all(groups[place] is group for place, group in seen)


def test_an_exception_of_on_group_ends_the_call_and_what_is_in_flight(fake, tiny_tokenizer, tmp_path):
    def on_group(place, group):
        raise KeyError("from the reward")

    fake.seconds_per_token = 0.02
    with engine_of([fake], tiny_tokenizer, tmp_path, stops=()) as engine:
        fake.fail(GENERATE, "late", seconds=0.5)
        with pytest.raises(KeyError, match="from the reward"):
            engine.generate(PROMPTS, 2, Sampling(4), on_group)
        (ids,) = [b["request_ids"] for r, b in fake.requests if r == "/inference/v1/abort_requests"]
        sent = {f"generate-tokens-{b['request_id']}" for r, b in fake.requests if r == GENERATE}
        assert ids and set(ids) <= sent
        assert len(engine.generate(PROMPTS[:2], 2, Sampling(4))) == 2
        assert engine.pop_metrics()["rollout/server_faults"] == 0


def test_closing_ends_a_call_of_another_thread(fake, tiny_tokenizer, tmp_path):
    fake.fail(GENERATE, "hang", times=None, seconds=20)
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine, ThreadPoolExecutor(1) as pool:
        call = pool.submit(engine.generate, PROMPTS[:1], 1, Sampling(4))
        while not fake.count(GENERATE):
            time.sleep(0.01)
        engine.close()
        with pytest.raises(RolloutError, match="closed"):
            call.result(5)


def test_a_request_that_waited_during_a_sync_counts_as_of_the_weights_it_asked_for():
    content = [{"token_id": 5, "logprob": -1.0}, {"token_id": 6, "logprob": -1.0}]
    spans = [{"version": "run:2", "start": 0, "end": 2}]
    choice = {
        "index": 0,
        "token_ids": [5, 6],
        "logprobs": {"content": content},
        "finish_reason": "length",
        "weight_versions": spans,
    }
    reader = Reader("http://a", "run", Weights("run:1", 1), 1, 2, frozenset(), 10)
    (answer,) = reader.read({"choices": [choice]})
    assert (answer.version, answer.versions) == (1, (2, 2))


def test_ctrl_c_ends_the_call_quickly(fake, tiny_tokenizer, tmp_path):
    fake.fail(GENERATE, "hang", times=None, seconds=60)

    def interrupt():
        while not fake.count(GENERATE):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    start = time.monotonic()
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine, pytest.raises(KeyboardInterrupt):
        threading.Thread(target=interrupt, daemon=True).start()
        engine.generate(PROMPTS, 2, Sampling(4))
    assert time.monotonic() - start < 20


def test_groups_go_to_the_server_with_fewest_outstanding_tokens(fakes, tiny_tokenizer, tmp_path):
    for fake in fakes:
        fake.seconds_per_token = 0.01
    long = Prompt("long", tuple(range(5, 205)), "text")
    with engine_of(fakes, tiny_tokenizer, tmp_path, stops=()) as engine:
        engine.generate([long, *PROMPTS[:4]], 1, Sampling(10))
    lengths = [sorted(len(b["token_ids"]) for r, b in fake.requests if r == GENERATE) for fake in fakes]
    assert lengths == [[200], [4, 4, 4, 4]]


def test_each_process_begins_at_another_server(fakes, tiny_tokenizer, tmp_path):
    for rank in (0, 1):
        gather = lambda value: [value, None]  # noqa: E731
        with engine_of(fakes, tiny_tokenizer, tmp_path, rank=rank, gather=gather) as engine:
            engine.generate(PROMPTS[:1], 1, Sampling(2))
    assert [fake.count(GENERATE) for fake in fakes] == [1, 1]


def test_no_server_gets_more_groups_at_once_than_allowed(fakes, tiny_tokenizer, tmp_path):
    for fake in fakes:
        fake.seconds_per_token = 0.005
    prompts = [Prompt(f"q{i}", (5, 6, 7 + i), "text") for i in range(16)]
    with engine_of(fakes, tiny_tokenizer, tmp_path, stops=(), max_concurrency=3) as engine:
        groups = engine.generate(prompts, 2, Sampling(4))
    assert [fake.peak for fake in fakes] == [3, 3]
    assert len(groups) == 16 and sum(fake.count(GENERATE) for fake in fakes) == 16


@pytest.mark.parametrize(
    ("prompt", "n", "sampling", "message"),
    [
        (Prompt("e", (), ""), 1, Sampling(4), "no tokens"),
        (Prompt("v", (5, 384), ""), 1, Sampling(4), "vocabulary of 384"),
        (Prompt("l", (5,) * 510, ""), 1, Sampling(4), "max_model_len of 512"),
        (PROMPTS[0], 0, Sampling(4), "at least 1"),
        (PROMPTS[0], 1, Sampling(4, temperature=0.001), "raises it to 0.01"),
    ],
)
def test_what_can_not_be_sampled_is_refused_before_it_is_sent(
    fake, tiny_tokenizer, tmp_path, prompt, n, sampling, message
):
    with engine_of([fake], tiny_tokenizer, tmp_path) as engine, pytest.raises(RolloutError, match=message):
        engine.generate([prompt], n, sampling)
    assert fake.count(GENERATE) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 64}, "another model .*hidden_size 64, not 48"),
        ({"logprobs_mode": "raw_logprobs"}, "before the temperature"),
        ({"weight_transfer": "nccl"}, "takes weights by nccl"),
        ({"plain_vllm": True}, "not one that `llmrl serve` started"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_once(fakes, tiny_tokenizer, tmp_path, overrides, message):
    fakes[1].overrides.update(overrides)
    start = time.monotonic()
    with pytest.raises((ConfigError, RolloutError), match=message) as caught:
        engine_of(fakes, tiny_tokenizer, tmp_path, start_timeout=60.0).__enter__()
    assert fakes[1].url in str(caught.value) and time.monotonic() - start < 20


def test_a_refused_token_stops_at_once(fake, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "another")
    with pytest.raises(ServerRefused, match="LLMRL_SERVER_TOKEN"):
        engine_of([fake], tiny_tokenizer, tmp_path, start_timeout=60.0).__enter__()


def test_synced_weights_are_sampled_with_and_named(fakes, tiny_tokenizer, tmp_path):
    weights = PlainWeights(fakes[0].model, noise=0.05)
    with engine_of(fakes, tiny_tokenizer, tmp_path) as engine:
        assert engine.version == 0 and engine.dtype == torch.float32
        assert engine.generate(PROMPTS[:1], 1, Sampling(4))[0][0].completion.version == 0
        report = engine.sync_weights(weights, 7)
        groups = engine.generate(PROMPTS, 2, Sampling(6, 0.7))
        engine.verify()
        probes = engine.probe((5, 6, 7), Sampling(4))
        assert engine.version == report.version == 7 and report.count == len(weights.tensors) and report.digest
    reference = fakes[0].model
    reference.load_state_dict(weights.tensors, strict=False)
    for prompt, group in zip(PROMPTS, groups):
        for r in group:
            assert r.completion.version == 7 and r.completion.versions == ()
            expected = logprobs_of(reference, prompt, r.completion, 0.7)
            torch.testing.assert_close(torch.tensor(r.completion.sampled_logprobs), expected, atol=1e-5, rtol=0)
    assert len(probes) == 2 and probes[0].ids == probes[1].ids


def test_an_update_in_the_middle_gives_each_token_its_version(fake, tiny_tokenizer, tmp_path):
    fake.seconds_per_token = 0.03
    reached = threading.Event()
    fake.on_token = lambda t: reached.set() if t == 5 else None
    with engine_of([fake], tiny_tokenizer, tmp_path, stops=()) as engine, ThreadPoolExecutor(1) as pool:
        engine.sync_weights(PlainWeights(fake.model), 1)
        future = pool.submit(engine.generate, PROMPTS[:1], 2, Sampling(40))
        assert reached.wait(5)
        engine.sync_weights(PlainWeights(fake.model, noise=0.05), 2)
        (group,) = future.result(20)
        (after,) = engine.generate(PROMPTS[1:2], 2, Sampling(4))
    for r in group:
        c = r.completion
        assert (
            c.version == 1
            and len(c.versions) == 40
            and set(c.versions) == {1, 2}
            and list(c.versions) == sorted(c.versions)
        )
    assert all(r.completion.version == 2 and not r.completion.versions for r in after)


class Processes:
    """`n` threads that act as training processes; `gather` waits for all of them."""

    def __init__(self, n):
        self.n, self.values = n, [None] * n
        self.barrier = threading.Barrier(n, timeout=20)

    def gather(self, rank):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return gather

    def run(self, act):
        with ThreadPoolExecutor(self.n) as pool:
            return [f.exception() or f.result() for f in [pool.submit(act, rank) for rank in range(self.n)]]


def test_all_processes_sample_with_what_the_first_one_sent(fakes, tiny_tokenizer, tmp_path):
    processes = Processes(2)
    weights = PlainWeights(fakes[0].model, noise=0.05)

    def act(rank):
        with engine_of(
            fakes, tiny_tokenizer, tmp_path, rank=rank, world_size=2, gather=processes.gather(rank)
        ) as engine:
            report = engine.sync_weights(weights, 3)
            groups = engine.generate(PROMPTS[rank::2], 2, Sampling(4))
            engine.verify()
            processes.barrier.wait()
            return engine.run_id, report, groups

    one, two = processes.run(act)
    assert one[0] == two[0] and one[1] == two[1] and one[1].count > 0
    assert all(r.completion.version == 3 for _, _, groups in (one, two) for g in groups for r in g)
    assert [fake.count("/finish_weight_update") for fake in fakes] == [1, 1]


def test_a_sync_that_fails_on_the_first_process_fails_on_all(fake, tiny_tokenizer, tmp_path):
    processes = Processes(2)
    fake.weight_fault = "lose_tensor"

    def act(rank):
        with engine_of(
            [fake], tiny_tokenizer, tmp_path, rank=rank, world_size=2, gather=processes.gather(rank)
        ) as engine:
            engine.sync_weights(PlainWeights(fake.model, noise=0.05), 3)

    one, two = processes.run(act)
    assert isinstance(one, SyncError)
    assert isinstance(two, LLMRLError) and "process 0 failed: SyncError" in str(two)


def test_a_server_that_restarts_under_another_process_is_given_the_weights_by_the_first(
    fakes, tiny_tokenizer, tmp_path
):
    processes = Processes(2)
    weights = PlainWeights(fakes[0].model, noise=0.05)

    def act(rank):
        with engine_of(
            fakes[:1], tiny_tokenizer, tmp_path, rank=rank, world_size=2, gather=processes.gather(rank)
        ) as engine:
            engine.sync_weights(weights, 3)
            processes.barrier.wait()
            groups = []
            if rank == 1:
                fakes[0].restart()
                groups = engine.generate(PROMPTS, 2, Sampling(4))
            processes.barrier.wait()
            return groups

    _, groups = processes.run(act)
    assert [r.completion.version for g in groups for r in g] == [3] * 12
    assert fakes[0].label.endswith(":3")


@pytest.mark.slow
def test_a_real_server_samples_from_the_models_distribution(vllm_server, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(vllm_server.model).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(vllm_server.model)
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", vllm_server.token)
    text = model.config
    described = {k: getattr(text, k) for k in MODEL}
    stops = tuple(range(100, 140))
    prompts = [Prompt(f"r{i}", tuple(range(3 + i, 20 + 2 * i)), "text") for i in range(4)]
    with engine_of([vllm_server], tokenizer, tmp_path, model=described, stops=stops, request_timeout=120.0) as engine:
        engine.sync_weights(PlainWeights(model), 1)
        for temperature in (0.7, 1.0, 0.0):
            groups = engine.generate(prompts, 4, Sampling(16, temperature, seed=1))
            for prompt, group in zip(prompts, groups):
                assert len({r.completion.ids for r in group}) == (1 if temperature == 0 else 4)
                for r in group:
                    c = r.completion
                    assert c.version == 1 and (c.ids[-1] in stops) == (c.finish_reason == "stop")
                    torch.testing.assert_close(
                        torch.tensor(c.sampled_logprobs), logprobs_of(model, prompt, c, temperature), atol=1e-5, rtol=0
                    )
        assert {r.completion.finish_reason for g in groups for r in g} <= {"stop", "length"}
        first = engine.generate(prompts, 4, Sampling(16, seed=1, step=2))
        same(first[2:3], engine.generate(prompts[2:3], 4, Sampling(16, seed=1, step=2)))
        assert {r.completion.finish_reason for g in first for r in g} == {"stop", "length"}


@pytest.mark.slow
def test_ctrl_c_ends_what_is_in_flight_on_a_real_server(vllm_server, tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(vllm_server.model)
    tokenizer = AutoTokenizer.from_pretrained(vllm_server.model)
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", vllm_server.token)
    described = {k: getattr(config, k) for k in MODEL}
    prompts = [Prompt(f"r{i}", (3, 4, 5 + i), "text") for i in range(16)]
    with engine_of([vllm_server], tokenizer, tmp_path, model=described, stops=(), request_timeout=120.0) as engine:
        label = engine._fleet.members[0].server.weight_label()
        engine._weights = Weights(label, int(label.rpartition(":")[2]) if ":" in label else 0)
        server, idle = engine._fleet.members[0].server, []

        def interrupt():
            idle.append(server.reset_prefix_cache())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Timer(0.3, interrupt).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, 8, Sampling(480))
        assert time.monotonic() - start < 20
        freed = time.monotonic() + 20  # long before 480 tokens would have been sampled
        while not (empty := server.reset_prefix_cache()) and time.monotonic() < freed:
            time.sleep(0.2)
        assert idle == [False] and empty  # blocks were held, and no longer are


@pytest.mark.slow
def test_a_real_server_is_updated_and_stopped_in_the_middle(vllm_server, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(vllm_server.model).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(vllm_server.model)
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", vllm_server.token)
    described = {k: getattr(model.config, k) for k in MODEL}
    prompts = [Prompt(f"r{i}", (3, 4, 5 + i), "text") for i in range(4)]
    long, settings = Sampling(400, seed=1), {"stops": (), "request_timeout": 300.0, "start_timeout": 500.0}
    with (
        engine_of([vllm_server], tokenizer, tmp_path, model=described, **settings) as engine,
        ThreadPoolExecutor(1) as pool,
    ):
        engine.sync_weights(PlainWeights(model), 1)
        future = pool.submit(engine.generate, prompts, 4, long)
        time.sleep(0.5)
        engine.sync_weights(PlainWeights(model, noise=0.02), 2)
        updated = [r.completion for g in future.result() for r in g]
        assert any(set(c.versions) == {1, 2} for c in updated)
        assert all(c.version == 1 and list(c.versions) == sorted(c.versions) for c in updated if c.versions)
        future = pool.submit(engine.generate, prompts, 4, long)
        time.sleep(0.5)
        assert not future.done()
        vllm_server.process.terminate()
        vllm_server.process.wait(60)  # it waits until the engine gives up what it will not answer
        vllm_server.stop()
        vllm_server.start()
        groups = future.result()
        assert [r.completion.version for g in groups for r in g] == [2] * 16
        assert engine.pop_metrics()["rollout/resent"] >= 1
        engine.verify()
        short = engine.generate(prompts, 2, Sampling(8))
    model.load_state_dict(PlainWeights(model, noise=0.02).tensors, strict=False)
    for prompt, group in zip(prompts, short):
        for r in group:
            torch.testing.assert_close(
                torch.tensor(r.completion.sampled_logprobs),
                logprobs_of(model, prompt, r.completion, 1.0),
                atol=1e-5,
                rtol=0,
            )
