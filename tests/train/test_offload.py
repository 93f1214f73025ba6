"""Offloading: the same bits as without, and only what the backward needs is moved.

There is no GPU here, so the CPU plays the device: what goes to the host is a copy in other memory.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmrl.config.model import ModelFields
from llmrl.models.forward import PolicyModule
from llmrl.models.load import load_policy
from llmrl.train import offload
from llmrl.train.backend import Backend
from llmrl.train.offload import offload_activations
from tests.models.families import batch_of, gradients
from tests.train.toy import Toy, batches_of, empty_batch, toy_config, toy_loss

CPU = torch.device("cpu")


@pytest.fixture
def moved(monkeypatch):
    """Every tensor that goes to the host; here the CPU counts as a device."""
    seen: list[torch.Tensor] = []
    copy = offload._to_host
    monkeypatch.setattr(offload, "HOST", "no device")
    monkeypatch.setattr(offload, "MIN_BYTES", 1024)
    monkeypatch.setattr(offload, "_to_host", lambda t: seen.append(t) or copy(t))
    return seen


def _gradients(config, offloaded):
    model, _ = load_policy(config)
    module = PolicyModule(model)
    batch = batch_of()
    with offload_activations(CPU) if offloaded else torch.enable_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            scores = module(batch, entropy=True)
        loss = scores.logprobs.sum() + scores.entropy.sum()
    loss.backward()
    return gradients(module), {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("lora", [None, {"r": 4}, {"r": 4, "use_dora": True}], ids=["full", "lora", "dora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradients_are_the_same_bits(tiny_model_dir, moved, lora, checkpointing, precision):
    config = ModelFields(
        model_name_or_path=str(tiny_model_dir), lora=lora, gradient_checkpointing=checkpointing, mixed_precision=precision
    )  # fmt: skip
    want, _ = _gradients(config, False)
    assert not moved
    got, parameters = _gradients(config, True)
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert moved and not parameters & {t.data_ptr() for t in moved}
    assert all(t.nbytes >= 1024 for t in moved)


@pytest.mark.parametrize("offloaded", [False, True])
def test_the_backward_reads_the_copy_on_the_host(moved, offloaded):
    layer = nn.Linear(32, 32)
    x = torch.randn(64, 32)
    with offload_activations(CPU) if offloaded else torch.enable_grad():
        loss = layer(x).sum()
    want = x.sum(0).expand(32, 32).clone()
    x.data.fill_(torch.nan)  # as if its memory had been given to something else
    loss.backward()
    assert torch.allclose(layer.weight.grad, want, atol=1e-5) == offloaded
    assert [t.shape for t in moved] == [x.shape] * offloaded


def test_on_the_cpu_everything_is_on_the_host_already():
    x = torch.randn(512, 64, requires_grad=True)
    with offload_activations(CPU):
        y = x.exp()
    assert y.grad_fn._saved_result.data_ptr() == y.data_ptr()


@pytest.mark.parametrize("asked", [False, True])
def test_the_backend_keeps_activations_where_the_recipe_says(tmp_path, moved, asked):
    backend = Backend(toy_config(tmp_path, activation_offloading=asked))
    backend.prepare(Toy(), total_updates=1)
    batches = batches_of([300, 200], 500)
    backend.update(batches, toy_loss, empty_batch)
    assert bool(moved) == asked
    plain = Backend(toy_config(tmp_path))
    plain.prepare(Toy(), total_updates=1)
    plain.update(batches, toy_loss, empty_batch)
    assert all(torch.equal(a, b) for a, b in zip(backend.unwrapped.parameters(), plain.unwrapped.parameters()))
