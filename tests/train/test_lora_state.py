"""The backend around a real module: the stream of full parameters, and an adapter's optimizer state."""

from __future__ import annotations

import pytest
import torch

from llmrl.config.sft import SFTConfig
from llmrl.models.forward import PolicyModule
from llmrl.models.load import load_policy
from llmrl.train.backend import Backend


@pytest.fixture
def adapted(tiny_model_dir, tmp_path):
    def make():
        config = SFTConfig(
            model_name_or_path=str(tiny_model_dir), output_dir=str(tmp_path), lora={"r": 2}, learning_rate=0.1
        )
        backend = Backend(config)
        model, _ = load_policy(config, device=backend.device)
        backend.prepare(PolicyModule(model), total_updates=4)
        return backend

    return make


def lora_loss(module, batch):
    return sum(p.square().sum() + p.sum() for p in module.parameters() if p.requires_grad), {}


def test_the_stream_has_the_plain_models_names_with_the_adapter_merged(adapted, tiny_model_dir):
    from transformers import AutoModelForCausalLM

    plain = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    backend = adapted()
    stream = dict(backend.policy_weights())
    assert stream.keys() == plain.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(stream[name], plain[name].detach())  # a new adapter changes nothing
    backend.update([0], lora_loss, lambda: 0)
    backend.update([0], lora_loss, lambda: 0)
    changed = dict(backend.policy_weights())
    assert not torch.allclose(changed[name], plain[name].detach())
    assert torch.equal(changed["model.norm.weight"], plain["model.norm.weight"].detach())


def test_only_the_adapter_has_optimizer_state_and_it_comes_back(adapted, tmp_path):
    from safetensors.torch import load_file

    backend = adapted()
    backend.update([0], lora_loss, lambda: 0)
    backend.gather_state()(tmp_path)
    saved = load_file(tmp_path / "optimizer.safetensors")
    assert saved and all("lora_" in name for name in saved)
    other = adapted()
    other.unwrapped.load_state_dict(backend.unwrapped.state_dict())
    other.load_state(tmp_path)
    for b in (backend, other):
        b.update([0], lora_loss, lambda: 0)
    ours, theirs = dict(backend.unwrapped.named_parameters()), dict(other.unwrapped.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
