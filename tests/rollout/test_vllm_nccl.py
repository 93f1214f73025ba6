"""The NCCL transfer as far as it goes without a GPU: vLLM's trainer half is a stand-in that sends through a file instead."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmrl.errors import ConfigError, SyncError
from llmrl.models.weights import ModelWeights
from llmrl.rollout.fingerprint import fingerprint
from llmrl.rollout.vllm_client import ServerFault, ServerGone, VLLMServer
from tests.rollout.fake_vllm import FakeVLLM
from tests.rollout.test_weight_sync import Stream, gap, send, train
from tests.servers import require_vllm

require_vllm_here = pytest.fixture(autouse=True)(lambda: require_vllm())


class TrainerHalf:
    """What `NCCLTrainerWeightTransferEngine` does at its documented surface, with its own check of the source; files for broadcasts."""

    made: ClassVar[list] = []

    @classmethod
    def trainer_init(cls, info, *, client, source):
        from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

        assert isinstance(client, VLLMWeightSyncClient) and info.rank == 0 and info.is_sender
        self = cls()
        self.info, self.client, self.source, self.hang = info, client, source, None
        self.aborted = threading.Event()
        client.init_weight_transfer_engine(
            {"master_address": info.master_address, "master_port": info.master_port, "world_size": info.world_size}
        )
        cls.made.append(self)
        return self

    def send_weights(self):
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

        meta = self.source.metadata()
        self.client.start_weight_update()
        pairs = NCCLTrainerWeightTransferEngine._checked_iter(self.source, meta)
        if self.hang is not None:
            next(pairs)
            with pytest.raises(ServerGone):
                self.client.update_weights({"files": []})
            if not self.aborted.wait(self.hang):
                return
            raise RuntimeError("NCCL error: remote process exited or there was a network error")
        path = self.directory / "broadcast.safetensors"
        save_file({n: t.clone() for n, t in pairs}, path)
        self.client.update_weights({"files": [str(path)]})
        self.client.finish_weight_update()

    def shutdown(self):
        self.aborted.set()


@pytest.fixture
def half(tmp_path):
    return type("Half", (TrainerHalf,), {"made": [], "directory": tmp_path})


@pytest.fixture
def transfer(half):
    from llmrl.rollout.vllm_nccl import NcclTransfer

    transfer = NcclTransfer(torch.float32, "trainer", engine_class=half, device="cpu", passes=2)
    yield transfer
    transfer.close()


@pytest.fixture
def fakes(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(VLLMServer, "received", lambda self: [])  # vLLM's own engine counts nothing
    with FakeVLLM(tiny_model_dir) as first, FakeVLLM(tiny_model_dir) as second:
        yield first, second


@pytest.fixture
def servers(fakes):
    servers = [VLLMServer(fake.url, fake.token, timeout=5) for fake in fakes]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def test_servers_get_the_weights_one_after_another(fakes, servers, transfer, half, model):
    for version in (1, 2):
        train(model, seed=version)
        weights = Stream(dict(ModelWeights(model)))
        report, failures = send(transfer, weights, version, servers)
        expected = fingerprint(weights.named.values())
        assert failures == [] and report.digest == expected.hex
        assert (report.count, report.bytes) == (expected.count, expected.bytes)
        assert weights.passes == 2 + (version == 1), "one a server, and one for the metadata at first"
        for server in servers:
            transfer.verify(server)
            assert gap(server, model)[0] < 1e-5
            assert server.weight_label() == f"run:{version}"
    assert len(half.made) == 2 and len({e.info.master_port for e in half.made}) == 2
    assert {(e.info.master_address, e.info.world_size, e.info.packed) for e in half.made} == {("trainer", 2, True)}


def test_other_processes_make_as_many_passes(servers, transfer, half, model):
    weights = Stream(dict(ModelWeights(model)))
    for passes in (3, 5):
        transfer.send(weights, "run:1", 1, [], sender=False)
        assert weights.passes == passes
    assert half.made == []


@pytest.mark.parametrize("up", [0, 1])
def test_passes_do_not_depend_on_what_goes_wrong(fakes, servers, transfer, model, up):
    weights = Stream(dict(ModelWeights(model)))
    send(transfer, weights, 1, servers[:up])
    assert weights.passes == 3, "the metadata's, and one for each server, up or not"
    train(model)
    weights = Stream(dict(ModelWeights(model)))
    fakes[0].weight_fault = "lose_tensor"
    with pytest.raises(SyncError) if up else nullcontext():
        send(transfer, weights, 2, servers[:up] or servers[1:])
    assert weights.passes == 2


def test_the_source_says_what_it_gives(model):
    from llmrl.rollout.vllm_nccl import PolicySource

    source = PolicySource(torch.bfloat16, "cpu")
    source.weights = Stream({"w": torch.randn(4, 3).T, "steps": torch.tensor([1, 2])})
    declared = [(m.name, m.dtype, m.shape) for m in source.metadata()]
    given = list(source)
    assert declared == [(n, t.dtype, tuple(t.shape)) for n, t in given]
    assert declared == [("w", torch.bfloat16, (3, 4)), ("steps", torch.int64, (2,))]
    assert all(t.is_contiguous() for _, t in given) and source.sent == fingerprint(t for _, t in given)


def test_tensors_that_change_their_shape(fakes, servers, transfer, model):
    named = dict(ModelWeights(model))
    send(transfer, Stream(named), 1, servers)
    named["model.norm.weight"] = torch.ones(3)
    taken = []

    class Counted(Stream):
        def __iter__(self):
            return ((n, taken.append(n) or t) for n, t in self.named.items())

    _, failures = send(transfer, Counted(named), 2, servers)
    assert len(failures) == 2 and "metadata() disagrees" in str(failures[0][1])
    assert len(taken) == 2 * len(named), "each pass goes to its end, since other processes gather"


def test_a_dropped_update_is_found(fakes, servers, transfer, model):
    train(model)
    fakes[0].weight_fault = "drop_update"
    with pytest.raises(SyncError, match="use `transfer: disk`"):
        send(transfer, ModelWeights(model), 1, servers)


def test_a_server_that_dies_in_the_middle_does_not_hang_the_trainer(fakes, servers, transfer, half, model):
    send(transfer, ModelWeights(model), 1, servers)
    train(model)
    half.made[0].hang = 60
    fakes[0].fail("/update_weights", "drop")
    weights = Stream(dict(ModelWeights(model)))
    import llmrl.rollout.vllm_nccl as module

    module_grace, module._GRACE = module._GRACE, 0.2
    try:
        _, failures = send(transfer, weights, 2, servers)
    finally:
        module._GRACE = module_grace
    assert [(s, type(e)) for s, e in failures] == [(servers[0], ServerGone)]
    assert half.made[0].aborted.is_set() and weights.passes == 2
    assert gap(servers[1], model)[0] < 1e-5, "the other server has its own communicator"
    fakes[0].restart()
    with pytest.raises(SyncError, match="at the next sync"):
        transfer.resend(servers[0])
    assert send(transfer, ModelWeights(model), 3, servers)[1] == []
    assert len(half.made) == 3 and gap(servers[0], model)[0] < 1e-5


def test_a_restart_between_syncs_gets_a_new_communicator(fakes, servers, transfer, half, model):
    send(transfer, ModelWeights(model), 1, servers)
    fakes[1].restart()
    assert send(transfer, ModelWeights(model), 2, servers)[1] == []
    assert len(half.made) == 3 and half.made[1].aborted.is_set()


def test_a_server_that_does_not_join(fakes, servers, transfer, model):
    fakes[0].fail("/init_weight_transfer_engine", "500")
    _, failures = send(transfer, ModelWeights(model), 1, servers)
    assert [(s, type(e)) for s, e in failures] == [(servers[0], ServerFault)]
    assert fakes[0]._resumed.is_set(), "its weights are whole"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_is_refused():
    from llmrl.rollout.vllm_nccl import NcclTransfer

    with pytest.raises(ConfigError, match=r"no CUDA device. Use `transfer: disk`"):
        NcclTransfer(torch.float32)
