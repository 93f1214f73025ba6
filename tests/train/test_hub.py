"""Uploads, through huggingface_hub itself, to a server that stands in for the hub."""

from __future__ import annotations

import hashlib
import importlib.util

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl.cli.main import main
from llmrl.config.model import LoraSettings, ModelFields
from llmrl.models.load import load_policy, save_model
from tests.train.hub import TOKEN, Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, as huggingface_hub would find it by HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET, which it reads once."""
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield stand_in
    stand_in.close()


def push(model, output, repo="me/tuned", *more) -> int:
    return main(["export", str(model), str(output), "--push-to-hub", repo, *more])


def here(directory) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_what_arrives_is_what_was_written(hub, tiny_model_dir, tmp_path, capsys):
    assert push(tiny_model_dir, tmp_path / "first", "tuned", "--max-shard-size", "20KB") == 0
    assert hub.files["me/tuned"] == here(tmp_path / "first") and hub.private["me/tuned"]
    assert "model.safetensors.index.json" in hub.files["me/tuned"] and "README.md" in hub.files["me/tuned"]
    assert f"pushed: {hub.url}/me/tuned/commit/" in capsys.readouterr().out
    assert b'from_pretrained("me/tuned")' in hub.files["me/tuned"]["README.md"]
    # In one file the next time: a shard that stayed would be loaded beside it. What others put there stays.
    hub.files["me/tuned"]["LICENSE"] = b"free"
    assert push(tiny_model_dir, tmp_path / "second", "me/tuned", "--dtype", "bf16") == 0
    assert hub.files["me/tuned"] == {**here(tmp_path / "second"), "LICENSE": b"free"}
    for name, content in hub.files["me/tuned"].items():
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again" / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16
    assert len(hub.commits) == 2


@pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="hf_xet is not installed")
def test_large_files_go_by_xet_where_it_is_installed(hub, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    assert push(tiny_model_dir, tmp_path / "out") == 0
    written, sent = here(tmp_path / "out"), hub.files["me/tuned"]
    assert sent.keys() == written.keys() and not hub.objects and sum(map(len, hub.pieces)) > 100_000
    for name, content in written.items():
        summed = f"sha256:{hashlib.sha256(content).hexdigest()}".encode()
        assert sent[name] == (summed if name in ("model.safetensors", "tokenizer.json") else content), name


def test_what_can_not_be_sent_is_refused_before_anything_is_written(hub, tiny_model_dir, tmp_path, monkeypatch, capsys):
    def refused(*words, repo="me/tuned", model=tiny_model_dir):
        assert push(model, tmp_path / "out", repo) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert not (tmp_path / "out").exists() and not hub.commits

    refused("me/--tuned", "alphanumeric", repo="me/--tuned")
    refused("other/tuned", "don't have the rights", "may not write there", repo="other/tuned")
    model, tokenizer = load_policy(ModelFields(model_name_or_path=str(tiny_model_dir), lora=LoraSettings(r=2)))
    save_model(model, tokenizer, tmp_path / "adapter")
    refused("only on this machine", "--merge", model=tmp_path / "adapter")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    refused("401", "not known there")
    monkeypatch.delenv("HF_TOKEN")
    refused("there is no token", "hf auth login")
    assert not hub.files
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("offline mode is enabled", "Nothing was written or sent")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("did not take the repository", "refused")


@pytest.mark.parametrize("part", ["/lfs/", "/commit/"])
def test_a_failed_upload_leaves_the_model_and_no_half_commit(hub, tiny_model_dir, tmp_path, capsys, part):
    hub.fail = {part: 403}
    assert push(tiny_model_dir, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "is written, but was not sent to me/tuned" in said and "403" in said and "hf upload me/tuned" in said
    assert hub.files["me/tuned"] == {}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
