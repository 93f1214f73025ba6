"""AdamW with moments in 8 bits: near AdamW, its state through plain tensors, and what is said where it can't be had."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from llmrl.errors import ConfigError
from llmrl.train.backend import Backend
from llmrl.train.launch import check_sharded
from llmrl.train.optim import build_optimizer
from llmrl.train.optim_state import OptimizerReader, write_pieces
from tests.train.toy import toy_config


class Net(nn.Module):
    """An embedding, a matrix above bitsandbytes' threshold, a small one and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(130, 64)
        self.large = nn.Linear(64, 70)
        self.small = nn.Linear(70, 5, bias=False)

    def forward(self, ids):
        return self.small(torch.tanh(self.large(self.embed(ids))))


def loss(module, ids):
    return (module(ids) - torch.sin(ids.float())[:, None]).square().mean(), {}


def ids(step):
    return torch.randint(0, 130, (200,), generator=torch.Generator().manual_seed(step))


def backend_of(path, **settings):
    config = toy_config(path, weight_decay=0.1, learning_rate=0.01, optimizer="adamw_8bit", **settings)
    backend = Backend(config)
    backend.prepare(Net(), total_updates=8)
    return backend


def test_what_is_said_without_bitsandbytes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.delitem(sys.modules, "llmrl.train.adamw8bit", raising=False)
    with pytest.raises(ConfigError, match=r"adamw_8bit needs bitsandbytes, .*pip install bitsandbytes"):
        build_optimizer(Net(), toy_config(tmp_path, optimizer="adamw_8bit"))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"optimizer": "adamw_8bit"}, "optimizer: adamw_8bit"),
        ({"quantization": "nf4", "lora": {}}, "quantization: nf4"),
        ({"optimizer": "adamw_8bit", "quantization": "int8", "lora": {}}, "adamw_8bit .* and quantization: int8"),
    ],
)
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_where_parameters_or_moments_are_sharded_it_is_refused_by_name(tmp_path, strategy, keys, named):
    with pytest.raises(ConfigError, match=f"{named} .* does not go with {strategy}: leave it out"):
        check_sharded(toy_config(tmp_path, **keys), strategy)
    check_sharded(toy_config(tmp_path), strategy)


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: adamw_8bit is not tested")


def test_what_is_kept_in_8_bits(bnb, tmp_path):
    """Two bytes a parameter and 8 a block of 256; embeddings and small tensors in 32 bits."""
    backend = backend_of(tmp_path)
    backend.update([ids(0)], loss, lambda: ids(0)[:1])
    module, state = backend.unwrapped, backend.optimizer.state
    assert [(len(g["params"]), g["weight_decay"], g["optim_bits"]) for g in backend.optimizer.param_groups] == [
        (2, 0.1, 8),
        (1, 0.1, 32),
        (1, 0.0, 8),
    ]
    large = state[module.large.weight]
    assert {key: value.dtype for key, value in large.items() if key != "step"} == {
        "state1": torch.uint8, "state2": torch.uint8, "absmax1": torch.float32, "absmax2": torch.float32,
        "qmap1": torch.float32, "qmap2": torch.float32,
    }  # fmt: skip
    assert large["state1"].shape == (70, 64) and large["absmax1"].shape == (18,)
    for small in (module.embed.weight, module.small.weight, module.large.bias):
        assert {k: v.dtype for k, v in state[small].items() if k != "step"} == {
            "state1": torch.float32,
            "state2": torch.float32,
        }


def test_updates_are_near_those_of_adamw(bnb, tmp_path):
    """First steps of Adam are sign-like: each parameter moves by about the rate, whatever the moments' precision."""
    ours, theirs = Net(), Net()
    start = [p.detach().clone() for p in ours.parameters()]
    config = toy_config(tmp_path, weight_decay=0.1, learning_rate=0.01)
    optimizers = [
        (ours, build_optimizer(ours, config.model_copy(update={"optimizer": "adamw_8bit"}))),
        (theirs, build_optimizer(theirs, config)),
    ]
    for step in range(4):
        for module, optimizer in optimizers:
            optimizer.zero_grad()
            loss(module, ids(step))[0].backward()
            optimizer.step()
    for before, a, b in zip(start, ours.parameters(), theirs.parameters()):
        assert (a - b).detach().norm() / (b - before).detach().norm() < 0.05


def test_a_run_that_is_cut_goes_on_bit_for_bit(bnb, tmp_path):
    whole = backend_of(tmp_path)
    for step in range(6):
        whole.update([ids(step)], loss, lambda: ids(0)[:1])
    first = backend_of(tmp_path)
    for step in range(3):
        first.update([ids(step)], loss, lambda: ids(0)[:1])
    write_pieces(tmp_path, first.strategy.optimizer_pieces())
    second = backend_of(tmp_path)
    second.unwrapped.load_state_dict(first.unwrapped.state_dict())
    second.updates = first.updates
    second.strategy.load_optimizer(OptimizerReader(tmp_path))
    assert all(type(state["step"]) is int for state in second.optimizer.state.values())
    for step in range(3, 6):
        second.update([ids(step)], loss, lambda: ids(0)[:1])
    assert all(torch.equal(a, b) for a, b in zip(whole.unwrapped.parameters(), second.unwrapped.parameters()))


def test_the_state_of_another_optimizer_is_refused(bnb, tmp_path):
    config = toy_config(tmp_path)
    module = Net()
    plain = build_optimizer(module, config)
    loss(module, ids(0))[0].backward()
    plain.step()
    eight = build_optimizer(module, config.model_copy(update={"optimizer": "adamw_8bit"}))
    state = {"state": plain.state_dict()["state"], "param_groups": eight.state_dict()["param_groups"]}
    with pytest.raises(ConfigError, match="another `optimizer` than adamw_8bit"):
        eight.load_state_dict(state)
