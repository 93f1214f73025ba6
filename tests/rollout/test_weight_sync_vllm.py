"""Weight transfer and its proof, against a real vLLM server."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmrl.errors import SyncError
from llmrl.models.export import write_export
from llmrl.models.weights import ModelWeights
from llmrl.rollout.vllm_client import VLLMServer
from llmrl.rollout.weight_files import WeightFiles
from llmrl.rollout.weight_sync import AdapterTransfer, DiskTransfer
from tests.rollout.test_weight_sync import gap, send, train

pytestmark = pytest.mark.slow

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def server(vllm_server):
    server = VLLMServer(vllm_server.url, vllm_server.token)
    yield server
    server.resume()
    server.close()


@pytest.fixture
def model(vllm_model):
    return AutoModelForCausalLM.from_pretrained(vllm_model, dtype=torch.float32).eval()


@pytest.fixture
def files(tmp_path):
    files = WeightFiles(tmp_path / "weights", "run")
    yield files
    files.close()


@contextmanager
def updates(change):
    """Changes the update's files on their way: `change` returns those to load instead."""
    original = VLLMServer.update
    VLLMServer.update = lambda self, info: [original(self, {"files": [path]}) for path in change(info["files"])]
    try:
        yield
    finally:
        VLLMServer.update = original


def test_whole_weights_and_faults(server, model, files, tmp_path):
    transfer = DiskTransfer(files, torch.float32)
    for version in (1, 2):
        train(model, seed=version)
        report, failures = send(transfer, ModelWeights(model), version, [server])
        assert failures == [] and report.count == 26
        transfer.verify(server)
        difference, answer = gap(server, model)
        assert difference < 1e-5
        assert answer["choices"][0]["weight_versions"] == [{"version": f"run:{version}", "start": 0, "end": 8}]

    train(model, seed=3)
    with updates(lambda paths: []), pytest.raises(SyncError, match=r"worker 0 read 0 tensors of 0 bytes"):
        send(transfer, ModelWeights(model), 3, [server])

    def lose_one(paths):
        tensors = load_file(paths[0])
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, tmp_path / "lost.safetensors")
        return [str(tmp_path / "lost.safetensors")]

    with updates(lose_one), pytest.raises(SyncError, match=r"worker 0 read 25 tensors.*sent were 26 tensors"):
        send(transfer, ModelWeights(model), 4, [server])

    def break_off(paths):
        """Half of an update, then a tensor that does not fit."""
        tensors = dict(list(load_file(paths[0]).items())[:13]) | {"model.norm.weight": torch.zeros(3)}
        save_file(tensors, tmp_path / "half.safetensors")
        return [str(tmp_path / "half.safetensors")]

    with updates(break_off):
        _, failures = send(transfer, ModelWeights(model), 5, [server])
    assert [s for s, _ in failures] == [server] and "stays paused" in str(failures[0][1])

    assert send(transfer, ModelWeights(model), 6, [server])[1] == [], "a whole update cures all of that"
    assert gap(server, model)[0] < 1e-5
    transfer.verify(server)

    other = {n: t + 0.01 for n, t in ModelWeights(model)}
    save_file(other, tmp_path / "other.safetensors")
    server.start_update()
    server.update({"files": [str(tmp_path / "other.safetensors")]})
    server.finish_update("run:6")
    with pytest.raises(SyncError, match=r"under the label run:6; after the sync they were .*another run"):
        transfer.verify(server)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 32}, "layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_adapters_agree_with_peft(server, model, files, config):
    torch.manual_seed(0)
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, **config)).eval()
    transfer = AdapterTransfer(DiskTransfer(files, torch.float32), files)
    for version in (1, 2, 3):
        train(lora, seed=version)
        report, failures = send(transfer, ModelWeights(lora), version, [server])
        assert failures == [] and report.count == len([n for n, _ in lora.named_parameters() if "lora_" in n])
        transfer.verify(server)
        difference, answer = gap(server, lora, transfer.adapter)
        assert difference < 1e-5 and answer["model"] == f"run:{version}"
    for name, _ in transfer._versions:
        server.unload_adapter(name)


def test_a_request_in_flight_keeps_its_adapter(server, model, files):
    torch.manual_seed(0)
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)).eval()
    transfer = AdapterTransfer(DiskTransfer(files, torch.float32), files)
    train(lora)
    send(transfer, ModelWeights(lora), 1, [server])
    params = {"temperature": 1.0, "max_tokens": 400, "seed": 1, "logprobs": 0, "ignore_eos": True, "detokenize": False}
    body = {"token_ids": [5, 6, 7], "model": "run:1", "sampling_params": params}
    answers = []
    request = threading.Thread(target=lambda: answers.append(server.generate(body, 120)))
    request.start()
    time.sleep(0.3)
    then = {n: p.detach().clone() for n, p in lora.named_parameters()}
    train(lora, seed=2)
    send(transfer, ModelWeights(lora), 2, [server])
    assert request.is_alive(), "it should still be generating; give it more tokens"
    assert gap(server, lora, "run:2")[0] < 1e-5, "a new request does not wait for the old one's adapter to be gone"
    request.join()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            parameter.copy_(then[name])
        choice = answers[0]["choices"][0]
        ids = torch.tensor([[5, 6, 7, *choice["token_ids"]]])
        expected = lora(ids).logits.log_softmax(-1)[0, 2:-1].gather(-1, ids[0, 3:, None])[:, 0]
    got = torch.tensor([c["logprob"] for c in choice["logprobs"]["content"]])
    assert answers[0]["model"] == "run:1" and (got - expected).abs().max() < 1e-4
    for name, _ in transfer._versions:
        server.unload_adapter(name)


def test_exports_are_loaded_unchanged(server, model, vllm_model, tmp_path):
    torch.manual_seed(0)
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR)).eval()
    train(lora, seed=4)
    lora.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    write_export(str(tmp_path / "saved"), tmp_path / "adapter")
    write_export(str(tmp_path / "saved"), tmp_path / "merged", merge=True, max_shard_size="50KB")

    def load(directory):
        server.start_update()
        server.update({"files": sorted(map(str, directory.glob("*.safetensors")))})
        server.finish_update("run:exported")

    load(vllm_model)  # other tests left other weights
    server.load_adapter("exported", str(tmp_path / "adapter"))
    assert gap(server, lora)[0] > 1e-2 and gap(server, lora, "exported")[0] < 1e-5
    server.unload_adapter("exported")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    load(tmp_path / "merged")
    assert gap(server, lora)[0] < 1e-5
