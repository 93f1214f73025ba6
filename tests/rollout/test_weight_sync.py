"""Weights move through files to servers that speak the protocol; every injected fault is found at its own sync."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmrl.config.rollout import RolloutSettings
from llmrl.errors import ConfigError, RolloutError, SyncError
from llmrl.models.weights import ModelWeights
from llmrl.rollout import weight_files, weight_sync
from llmrl.rollout.fingerprint import Fingerprint, fingerprint
from llmrl.rollout.vllm_client import ServerFault, ServerGone, VLLMServer
from llmrl.rollout.weight_files import WeightFiles
from llmrl.rollout.weight_proof import Proof
from llmrl.rollout.weight_sync import AdapterTransfer, DiskTransfer, make_transfer
from tests.rollout.fake_vllm import FakeVLLM

PROMPT = list(range(5, 15))


class Stream:
    """Weights that are a dict."""

    adapter_rank = None

    def __init__(self, named):
        self.named, self.passes = named, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.named.items())


@pytest.fixture
def fakes(tiny_model_dir):
    with FakeVLLM(tiny_model_dir) as first, FakeVLLM(tiny_model_dir) as second:
        yield first, second


@pytest.fixture
def servers(fakes):
    servers = [VLLMServer(fake.url, fake.token, timeout=5) for fake in fakes]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def transfer(tmp_path):
    transfer = DiskTransfer(WeightFiles(tmp_path / "weights", "run"), torch.float32)
    yield transfer
    transfer.close()


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def train(model, seed=0):
    """Other weights, as a step of training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def send(transfer, weights, version, servers):
    return transfer.send(weights, f"run:{version}", version, servers, sender=True)


def gap(server, model, name=None):
    """Largest |sampled - recomputed| log-prob, and the answer."""
    params = {"n": 1, "temperature": 1.0, "max_tokens": 8, "seed": 3, "logprobs": 0, "ignore_eos": True}
    body = {"token_ids": PROMPT, "cache_salt": "x", "sampling_params": {**params, "detokenize": False}}
    answer = server.generate(body | ({"model": name} if name else {}), 120)
    choice = answer["choices"][0]
    ids = torch.tensor([PROMPT + choice["token_ids"]])
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)[0, len(PROMPT) - 1 : -1]
    expected = logprobs.gather(-1, ids[0, len(PROMPT) :, None])[:, 0]
    got = torch.tensor([c["logprob"] for c in choice["logprobs"]["content"]])
    return (expected - got).abs().max().item(), answer


# -- whole weights


def test_all_servers_get_the_weights(fakes, servers, transfer, model):
    for version in (1, 2):
        train(model, seed=version)
        report, failures = send(transfer, ModelWeights(model), version, servers)
        assert failures == []
        expected = fingerprint(t for _, t in ModelWeights(model))
        assert (report.version, report.count, report.bytes) == (version, expected.count, expected.bytes)
        assert report.digest == expected.hex and report.seconds > 0
        for fake, server in zip(fakes, servers):
            transfer.verify(server)
            difference, answer = gap(server, model)
            assert difference < 1e-5
            assert answer["choices"][0]["weight_versions"][0]["version"] == f"run:{version}"
            routes = [
                r
                for r, _ in fake.requests
                if r in ("/pause", "/finish_weight_update", "/reset_prefix_cache", "/resume")
            ]
            assert routes == ["/pause", "/finish_weight_update", "/reset_prefix_cache", "/resume"] * version


def test_files_are_written_before_any_server_is_paused(fakes, servers, transfer, model):
    def stream():
        for name, tensor in ModelWeights(model):
            assert fakes[0].count("/pause") == 0
            yield name, tensor

    transfer.send_stream(stream(), "run:1", 1, servers, sender=True)
    assert fakes[0].count("/pause") == 1


def test_a_process_that_does_not_send_iterates_to_the_end(fakes, servers, transfer, model):
    taken = []
    stream = ((n, taken.append(n) or t) for n, t in ModelWeights(model))
    report, failures = transfer.send_stream(stream, "run:1", 1, servers, sender=False)
    assert len(taken) == len(dict(ModelWeights(model))) and failures == [] and report.version == 1
    assert fakes[0].requests == []


def test_weights_are_cast_once_to_the_servers_type(tmp_path):
    files = WeightFiles(tmp_path, "run")
    tensor, steps = torch.randn(8, 6), torch.tensor([3, 4])
    shipment = files.write([("a", tensor.T), ("steps", steps), ("scale", torch.tensor(2.0))], "run:1", torch.bfloat16)
    loaded = load_file(shipment.files[0])
    assert torch.equal(loaded["a"], tensor.T.bfloat16()) and torch.equal(loaded["steps"], steps)
    assert loaded["scale"].shape == ()
    assert shipment.content == fingerprint(loaded.values())
    files.close()


def test_views_of_one_storage_can_be_sent(tmp_path):
    flat = torch.randn(100)
    files = WeightFiles(tmp_path, "run")
    shipment = files.write([("a", flat[:40].view(4, 10)), ("b", flat[40:]), ("c", flat[:1])], "run:1", torch.float32)
    loaded = load_file(shipment.files[0])
    assert torch.equal(loaded["a"], flat[:40].view(4, 10)) and torch.equal(loaded["b"], flat[40:])
    assert sum(path.stat().st_size for path in shipment.files) < 141 * 4 + 1000
    files.close()


# -- files


def test_buckets_and_memory_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "BUCKET_BYTES", 1000)
    sizes = [100, 60, 40, 400, 200, 50, 1, 249, 250, 251, 3]  # elements of 4 bytes
    alive: list[weakref.ref] = []
    peak = 0

    def stream():
        nonlocal peak
        for i, size in enumerate(sizes):
            tensor = torch.full((size,), float(i))
            alive.append(weakref.ref(tensor))
            peak = max(peak, sum(t().nbytes for t in alive if t() is not None))
            yield f"w{i}", tensor
            del tensor

    files = WeightFiles(tmp_path, "run")
    shipment = files.write(stream(), "run:1", torch.float32)
    held = [[t.numel() for t in load_file(path).values()] for path in shipment.files]
    assert sorted(n for bucket in held for n in bucket) == sorted(sizes)
    assert all(4 * sum(bucket) <= 1000 or len(bucket) == 1 for bucket in held)
    assert len(held) == 7
    assert peak <= 1000 + 1600, "a bucket and the tensor that comes next"
    files.close()


def test_one_version_is_kept_and_the_directory_is_private(tmp_path):
    files = WeightFiles(tmp_path, "run")
    for version in (1, 2):
        shipment = files.write([("w", torch.ones(version))], f"run:{version}", torch.float32)
    assert stat.S_IMODE(files.path.stat().st_mode) == 0o700
    assert [p.name for p in files.path.iterdir() if p.is_dir()] == ["run-2.weights"]
    manifest = json.loads((shipment.files[0].parent / "manifest.json").read_text())
    assert manifest["label"] == "run:2" and manifest["count"] == 1 and manifest["bytes"] == 8
    assert manifest["digest"] == shipment.content.hex and manifest["files"] == [shipment.files[0].name]
    files.close()
    files.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_directories_of_ended_runs_go(tmp_path, end):
    ends = {"exit": "", "kill": f"import os; os.kill(os.getpid(), {signal.SIGKILL})"}
    code = (
        "import sys, torch; from pathlib import Path; from llmrl.rollout.weight_files import WeightFiles\n"
        "WeightFiles(Path(sys.argv[1]), 'other').write([('w', torch.ones(3))], 'other:1', torch.float32)\n" + ends[end]
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    other = tmp_path / "llmrl-other"
    assert other.exists() == (end == "kill")
    (tmp_path / "llmrl-not-ours").mkdir()
    alive, mine = WeightFiles(tmp_path, "alive"), WeightFiles(tmp_path, "mine")
    for files in (alive, mine):
        files.write([("w", torch.ones(3))], "x:1", torch.float32)
    assert not other.exists() and alive.path.exists() and (tmp_path / "llmrl-not-ours").exists()
    alive.close(), mine.close()


def test_a_forked_child_leaves_the_directory_alone(tmp_path):
    files = WeightFiles(tmp_path, "run")
    files.write([("w", torch.ones(3))], "run:1", torch.float32)
    child = os.fork()
    if child == 0:
        files.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert files.path.exists()
    files.close()


@pytest.mark.parametrize("how", ["no room", "breaks off"])
def test_a_full_disk_leaves_servers_alone(fakes, servers, transfer, model, monkeypatch, how):
    send(transfer, ModelWeights(model), 1, servers)
    monkeypatch.setattr(weight_files, "BUCKET_BYTES", 20_000)
    if how == "no room":
        usage = iter([10**9, 10**9, 5000])
        monkeypatch.setattr(weight_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": next(usage)}))
    else:
        saved = []

        def save(bucket, path):
            saved.append(path)
            path.write_bytes(b"half")
            if len(saved) == 3:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(weight_files, "save_file", save)
    taken = []
    with pytest.raises(RolloutError, match=r"run:2 can't be written to .*No server was touched.*rollout.transfer_dir"):
        transfer.send_stream(
            ((n, taken.append(n) or t) for n, t in ModelWeights(model)), "run:2", 2, servers, sender=True
        )
    assert len(taken) == len(dict(ModelWeights(model))), "other processes gather to the end"
    assert [p for p in transfer._files.path.iterdir() if p.is_dir()] == []
    for fake, server in zip(fakes, servers):
        assert fake.count("/pause") == 1
        transfer.verify(server)
        assert gap(server, model)[0] < 1e-5


def test_what_can_t_be_sent(tmp_path):
    files = WeightFiles(tmp_path, "run")
    with pytest.raises(RolloutError, match="hold 'w' twice"):
        files.write([("w", torch.ones(3)), ("w", torch.ones(3))], "run:1", torch.float32)
    with pytest.raises(RolloutError, match="no tensors"):
        files.write([], "run:1", torch.float32)
    files.close()


# -- faults, each found at its own sync


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fault", ["drop_update", "lose_tensor", "half_update"])
def test_lost_updates_are_found_at_once(fakes, servers, transfer, model, fault, first):
    if not first:
        send(transfer, ModelWeights(model), 1, servers)
    train(model)
    fakes[1].weight_fault = fault
    with pytest.raises(
        SyncError, match=rf"{fakes[1].url}: worker 0 read .* of weights run:2; sent were .* again"
    ) as caught:
        send(transfer, ModelWeights(model), 2, servers)
    assert "paused" in str(caught.value) and not fakes[1]._resumed.is_set()
    assert gap(servers[0], model)[0] < 1e-5, "the other server is served"
    fakes[1].weight_fault = None
    assert send(transfer, ModelWeights(model), 3, servers)[1] == []
    assert gap(servers[1], model)[0] < 1e-5


@pytest.mark.parametrize("fault", ["drop_update", "lose_tensor", "half_update"])
def test_memory_is_compared_as_well(fakes, servers, transfer, model, fault, monkeypatch):
    """As where all was read and the model did not take it, or where the transfer does not count."""
    monkeypatch.setattr(VLLMServer, "received", lambda self: [])
    send(transfer, ModelWeights(model), 1, servers)
    train(model)
    fakes[0].weight_fault = fault
    with pytest.raises(SyncError, match=r"memory has the sum .*, sent was .*; earlier syncs agreed"):
        send(transfer, ModelWeights(model), 2, servers)


def test_a_first_update_that_is_dropped_is_no_transformation(fakes, servers, transfer, model, monkeypatch):
    monkeypatch.setattr(VLLMServer, "received", lambda self: [])
    train(model)
    fakes[0].weight_fault = "drop_update"
    with pytest.raises(SyncError, match="the update changed nothing in it"):
        send(transfer, ModelWeights(model), 1, servers)


def test_restored_weights_are_found_by_verify(fakes, servers, transfer, model):
    send(transfer, ModelWeights(model), 1, servers)
    train(model)
    fakes[0].weight_fault = "restore_stale"
    send(transfer, ModelWeights(model), 2, servers)
    transfer.verify(servers[0])
    gap(servers[0], model)
    with pytest.raises(
        SyncError, match=r"under the label run:2; after the sync they were .*stale weights were restored"
    ):
        transfer.verify(servers[0])
    transfer.verify(servers[1])


def test_another_runs_update_is_found_by_verify(servers, transfer, model, tmp_path):
    send(transfer, ModelWeights(model), 1, servers)
    other = DiskTransfer(WeightFiles(tmp_path, "other"), torch.float32)
    other.send(ModelWeights(model), "other:1", 1, servers[:1], sender=True)
    other.close()
    with pytest.raises(SyncError, match=r"labelled 'other:1', expected 'run:1'.*another run"):
        transfer.verify(servers[0])


def test_a_label_that_is_not_taken_is_found(fakes, servers, transfer, model, monkeypatch):
    monkeypatch.setattr(
        FakeVLLM, "_post_finish_weight_update", lambda self, body, query: setattr(self, "_updating", False)
    )
    with pytest.raises(SyncError, match="labelled 'default', expected 'run:1'"):
        send(transfer, ModelWeights(model), 1, servers)


def test_another_model_does_not_fit(fakes, servers, transfer, model):
    wider = {n: torch.zeros(*t.shape, 2) if "q_proj.weight" in n else t for n, t in ModelWeights(model)}
    report, failures = send(transfer, Stream(wider), 1, servers)
    assert [s for s, _ in failures] == servers and report.count == len(wider)
    for fake, (_, error) in zip(fakes, failures):
        assert isinstance(error, ServerFault) and "stays paused" in str(error) and "rollout.transfer_dir" in str(error)
        assert fake.count("/start_weight_update") == 2 and fake.count("/resume") == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("model.norm.weight"), "lack 'model.norm.weight'"),
        (lambda w: w.update(x=torch.ones(2)), "hold for the first time 'x'"),
        (lambda w: w.update({"model.norm.weight": torch.ones(2)}), "have another shape of 'model.norm.weight'"),
    ],
)
def test_tensors_that_the_trainer_loses_are_found(fakes, servers, transfer, model, change, says):
    named = dict(ModelWeights(model))
    send(transfer, Stream(named), 1, servers)
    change(named)
    with pytest.raises(SyncError, match=f"run:2 {says}.*Not sent"):
        send(transfer, Stream(named), 2, servers)
    assert fakes[0].count("/pause") == 1


def test_one_fault_is_cured_by_sending_all_again(fakes, servers, transfer, model):
    train(model)
    fakes[0].fail("/update_weights", "500")
    assert send(transfer, ModelWeights(model), 1, servers)[1] == []
    assert fakes[0].count("/start_weight_update") == 2 and fakes[1].count("/start_weight_update") == 1
    assert gap(servers[0], model)[0] < 1e-5


def test_a_server_that_keeps_failing_stays_paused_until_a_whole_update(fakes, servers, transfer, model):
    fakes[0].fail("/update_weights", "500", times=2)
    _, failures = send(transfer, ModelWeights(model), 1, servers)
    assert [s for s, _ in failures] == servers[:1]
    assert not fakes[0]._resumed.is_set() and fakes[1]._resumed.is_set()
    transfer.resend(servers[0])
    assert fakes[0]._resumed.is_set()
    transfer.verify(servers[0])


def test_a_pause_that_fails_does_not_leave_a_server_paused(fakes, servers, transfer, model):
    fakes[0].fail("/pause", "500")
    _, failures = send(transfer, ModelWeights(model), 1, servers)
    assert [s for s, _ in failures] == servers[:1] and fakes[0]._resumed.is_set()
    assert fakes[0].count("/start_weight_update") == 0


def test_a_dead_server_does_not_keep_the_others_waiting(fakes, servers, transfer, model):
    send(transfer, ModelWeights(model), 1, servers)
    train(model)
    fakes[0].kill()
    _, failures = send(transfer, ModelWeights(model), 2, servers)
    assert [(s, type(e)) for s, e in failures] == [(servers[0], ServerGone)]
    assert gap(servers[1], model)[0] < 1e-5
    fakes[0].start()
    with pytest.raises(SyncError, match=r"labelled 'default', expected 'run:1'\. It was started again"):
        transfer.verify(servers[0])
    transfer.resend(servers[0])
    transfer.verify(servers[0])
    assert gap(servers[0], model)[0] < 1e-5


def test_nothing_to_send_again(servers, transfer):
    with pytest.raises(SyncError, match="no weights to send again"):
        transfer.resend(servers[0])
    with pytest.raises(SyncError, match="no weights were sent"):
        transfer.verify(servers[0])


def test_servers_are_updated_at_the_same_time(fakes, servers, transfer, model, monkeypatch):
    both = threading.Barrier(2, timeout=5)
    load = FakeVLLM._post_update_weights
    monkeypatch.setattr(
        FakeVLLM, "_post_update_weights", lambda self, body, query: (both.wait(), load(self, body, query))[1]
    )
    assert send(transfer, ModelWeights(model), 1, servers)[1] == []


# -- servers whose memory can't have the sum of what is sent


class Told:
    """A server that says what it is told to say."""

    url = "http://told"

    def __init__(self, held, *, read=True, **described):
        self.held, self.read, self.described, self.sent = held, read, described, None

    def describe(self):
        return self.described

    def weights(self):
        return [Fingerprint(1, 4, h) for h in self.held]

    def received(self):
        return [self.sent] * len(self.held) if self.read else []

    def weight_label(self):
        return "l"


def check(proof, server, sent, held, before=None):
    server.sent, server.held = Fingerprint(2, 8, sent), held
    proof.check(server, "l", server.sent, before)


def test_models_that_transform_their_parameters(caplog):
    proof, server = Proof(), Told([7])
    with caplog.at_level(logging.WARNING, "llmrl"):
        check(proof, server, sent=10, held=[12], before=[Fingerprint(1, 4, 12)])
        check(proof, server, sent=11, held=[15])
        check(proof, server, sent=11, held=[15])
    assert len(caplog.records) == 1 and "transformed while loading" in caplog.text
    with pytest.raises(SyncError, match="the weights changed and its memory did not"):
        check(proof, server, sent=13, held=[15])
    with pytest.raises(SyncError, match="its memory changed and the weights did not"):
        check(proof, server, sent=11, held=[16])


@pytest.mark.parametrize("kind", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_sharded_servers(kind, caplog):
    proof, server = Proof(), Told([1, 2], **{kind: 2})
    check(proof, server, sent=10, held=[4, 8])
    check(proof, server, sent=11, held=[5, 8])
    assert not caplog.records
    with pytest.raises(SyncError, match="the weights changed and its memory did not"):
        check(proof, server, sent=12, held=[5, 8])
    check(proof, server, sent=12, held=[6, 8])
    server.held = [6, 9]
    with pytest.raises(SyncError, match="Something changed them since"):
        proof.verify(server)


def test_quantised_servers_may_round_a_change_away(caplog):
    proof, server = Proof(), Told([1], quantization="fp8")
    check(proof, server, sent=10, held=[4])
    check(proof, server, sent=11, held=[4])
    assert not caplog.records
    server.read = True
    server.sent, server.held = Fingerprint(1, 8, 11), [4]
    with pytest.raises(SyncError, match="worker 0 read"):
        proof.check(server, "l", Fingerprint(2, 8, 12), None)


def test_a_server_that_comes_back_with_more_workers():
    proof, server = Proof(), Told([10])
    check(proof, server, sent=10, held=[10])
    server.described = {"tensor_parallel_size": 2}
    check(proof, server, sent=10, held=[5, 6])
    proof.verify(server)


# -- adapters


def policy(model, **config):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    return get_peft_model(model, LoraConfig(**config)).eval()


@pytest.fixture
def adapters(tmp_path):
    files = WeightFiles(tmp_path / "weights", "run")
    transfer = AdapterTransfer(DiskTransfer(files, torch.float32), files)
    yield transfer
    transfer.close()


def test_adapters_are_sent_alone(fakes, servers, adapters, model, tmp_path):
    lora = policy(model)
    for version in range(1, 5):
        train(lora, seed=version)
        report, failures = send(adapters, ModelWeights(lora), version, servers)
        assert failures == [] and adapters.adapter == f"run:{version}"
        assert report.count == 12 and 0 < report.bytes < 50_000 and report.digest
        for fake, server in zip(fakes, servers):
            adapters.verify(server)
            difference, answer = gap(server, lora, adapters.adapter)
            assert difference < 1e-5 and answer["model"] == f"run:{version}"
            assert list(fake.adapters) == [f"run:{v}" for v in (version - 1, version) if v > 0]
            assert fake.count("/start_weight_update") == fake.count("/pause") == 0, (
                "it was started with the base weights"
            )
    left = sorted(p.name for p in (tmp_path / "weights" / "llmrl-run").iterdir() if p.is_dir())
    assert left == ["run-3.adapter", "run-4.adapter"]


def test_base_weights_that_a_server_lacks_are_sent(fakes, servers, adapters, model):
    train(model)
    lora = policy(model)
    train(lora)
    assert send(adapters, ModelWeights(lora), 1, servers)[1] == []
    train(lora)
    assert send(adapters, ModelWeights(lora), 2, servers)[1] == []
    assert [fake.count("/start_weight_update") for fake in fakes] == [1, 1]
    assert gap(servers[0], lora, "run:2")[0] < 1e-5


def test_a_restarted_server_gets_base_and_adapters(fakes, servers, adapters, model):
    train(model)
    lora = policy(model)
    send(adapters, ModelWeights(lora), 1, servers)
    train(lora)
    send(adapters, ModelWeights(lora), 2, servers)
    fakes[0].restart()
    adapters.resend(servers[0])
    assert list(fakes[0].adapters) == ["run:1", "run:2"]
    assert gap(servers[0], lora, "run:2")[0] < 1e-5
    fakes[0].restart()
    train(lora)
    assert send(adapters, ModelWeights(lora), 3, servers)[1] == [], "also when nobody noticed"
    adapters.verify(servers[0])
    assert gap(servers[0], lora, "run:3")[0] < 1e-5


def test_base_weights_changed_behind_an_adapter_are_found(fakes, servers, adapters, model):
    lora = policy(model)
    send(adapters, ModelWeights(lora), 1, servers)
    with torch.no_grad():
        fakes[1].model.model.norm.weight.add_(0.1)
    with pytest.raises(SyncError, match="Something changed them since"):
        adapters.verify(servers[1])
    with pytest.raises(SyncError, match="Something changed them since"):
        send(adapters, ModelWeights(lora), 2, servers)


def test_a_restart_with_another_base_is_found(fakes, servers, adapters, model):
    send(adapters, ModelWeights(policy(model)), 1, servers)
    fakes[0].restart()
    with torch.no_grad():
        fakes[0].model.model.norm.weight.add_(0.1)
    with pytest.raises(SyncError, match="restarted with other base weights"):
        adapters.resend(servers[0])


def test_an_adapter_that_is_refused(fakes, servers, adapters, model):
    fakes[0].fail("/v1/load_lora_adapter", "500")
    _, failures = send(adapters, ModelWeights(policy(model)), 1, servers)
    assert [s for s, _ in failures] == servers[:1] and "start the server without LoRA" in str(failures[0][1])
    adapters.resend(servers[0])
    assert list(fakes[0].adapters) == ["run:1"]


# -- the choice


def choose(tmp_path, servers, weights, *, described=None, **settings):
    settings = RolloutSettings(engine="vllm_server", urls=[s.url for s in servers], **settings)
    describe = servers[0].describe() | (described or {})
    return make_transfer(settings, servers, run_id="r", output_dir=tmp_path / "out", weights=weights, describe=describe)


def test_where_the_files_go(fakes, servers, tmp_path, model, monkeypatch):
    def place(servers, **settings):
        return choose(tmp_path, servers, ModelWeights(model), **settings)._files.path

    monkeypatch.setattr(weight_sync, "_SHARED_MEMORY", tmp_path)
    assert place(servers) == tmp_path / "llmrl-r"
    assert place(servers, transfer_dir=str(tmp_path / "there")) == tmp_path / "there" / "llmrl-r"
    free = type("Usage", (), {"free": servers[0].weights()[0].bytes})
    monkeypatch.setattr(weight_sync.shutil, "disk_usage", lambda _: free)
    assert place(servers) == tmp_path / "out" / "weights" / "llmrl-r", "too little shared memory"
    monkeypatch.undo()
    far = VLLMServer("http://10.1.2.3:8000", "t")
    monkeypatch.setattr(weight_sync, "_SHARED_MEMORY", tmp_path)
    assert place([*servers, far]) == tmp_path / "out" / "weights" / "llmrl-r"
    assert not (tmp_path / "llmrl-r").exists(), "nothing is made before it is needed"


def test_which_transfer(servers, tmp_path, model, caplog):
    caplog.set_level(logging.INFO, "llmrl")
    assert type(choose(tmp_path, servers, ModelWeights(model))) is DiskTransfer and caplog.text == ""
    lora = ModelWeights(policy(model))
    transfer = choose(tmp_path, servers, lora, max_staleness=2)
    assert type(transfer) is AdapterTransfer and transfer._keep == 3 and caplog.text == ""
    for described, says in (({"max_lora_rank": None}, "without LoRA"), ({"max_lora_rank": 2}, "up to rank 2")):
        caplog.clear()
        assert type(choose(tmp_path, servers, lora, described=described)) is DiskTransfer
        assert says in caplog.text
    caplog.clear()
    dora = ModelWeights(policy(AutoModelForCausalLM.from_config(model.config), use_dora=True))
    assert type(choose(tmp_path, servers, dora)) is DiskTransfer and "the adapter has use_dora" in caplog.text


def test_servers_started_for_another_transfer(servers, tmp_path, model):
    with pytest.raises(ConfigError, match=r"rollout.transfer is disk, and .* was started for nccl.*--transfer disk"):
        choose(tmp_path, servers, ModelWeights(model), described={"weight_transfer": "nccl"})
    with pytest.raises(ConfigError, match=r"started for disk.*--transfer nccl"):
        choose(tmp_path, servers, ModelWeights(model), transfer="nccl")
