"""The schedule against transformers', the groups against transformers', the state through a file."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from llmrl.errors import ConfigError
from llmrl.train.collectives import Collectives
from llmrl.train.optim import (
    build_optimizer,
    decays,
    learning_rate_at,
    warmup_updates,
)
from llmrl.train.optim_state import OptimizerReader, Piece, held, write_pieces
from llmrl.train.replicated import Replicated
from tests.train.toy import Toy, toy_config


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10), (1, 1), (10, 10), (4, 3)])
def test_schedule_equals_transformers(tmp_path, kind, warmup, total):
    from transformers import get_scheduler

    config = toy_config(tmp_path, learning_rate=0.25, lr_scheduler_type=kind, warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.25)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for update in range(total):
        assert learning_rate_at(config, update, total) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()
    if total > warmup and kind != "constant":  # theirs rises again after the end of a cosine, ours stays
        assert [learning_rate_at(config, total + i, total) for i in range(3)] == [0.0] * 3


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_minimum_rate(tmp_path, kind):
    config = toy_config(tmp_path, learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=2, min_lr_ratio=0.1)
    rates = [learning_rate_at(config, u, 10) for u in range(12)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[10:] == pytest.approx([0.1, 0.1])
    assert rates[6] == pytest.approx(0.55)
    assert all(a > b for a, b in itertools.pairwise(rates[2:11]))


def test_warmup_ratio_rounds_up_and_steps_win(tmp_path):
    assert warmup_updates(toy_config(tmp_path, warmup_ratio=0.1), 25) == 3
    assert warmup_updates(toy_config(tmp_path, warmup_ratio=0.1, warmup_steps=0), 25) == 0


def tiny(config_class, **extra):
    from transformers import AutoModelForCausalLM

    config = config_class(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, **extra,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["Qwen2Config", "Qwen3Config", "LlamaConfig", "Gemma2Config", "MistralConfig"])
def test_decay_groups_equal_the_hugging_face_trainers(family):
    import transformers
    from transformers.trainer_pt_utils import get_parameter_names

    model = tiny(getattr(transformers, family))
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    theirs = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    ours = {name for name, p in model.named_parameters() if decays(name, p)}
    assert ours == theirs & {name for name, _ in model.named_parameters()}
    assert any("embed" in name for name in ours)


def test_stacked_biases_do_not_decay():
    assert not decays("experts.gate_up_proj_bias", nn.Parameter(torch.zeros(4, 8)))
    assert decays("experts.gate_up_proj", nn.Parameter(torch.zeros(4, 8, 8)))


def test_groups_and_frozen_parameters(tmp_path):
    module = Toy()
    module.embed.weight.requires_grad_(False)
    optimizer = build_optimizer(module, toy_config(tmp_path, weight_decay=0.1))
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.1), (3, 0.0)]
    for p in module.parameters():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(module, toy_config(tmp_path))


def take_step(module, optimizer):
    module(torch.arange(17)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def strategy_of(module, config):
    strategy = Replicated(Collectives(0, 1, torch.device("cpu")))
    strategy.prepare(module, lambda m: build_optimizer(m, config))
    return strategy


def test_state_goes_through_names(tmp_path):
    config = toy_config(tmp_path, weight_decay=0.1)
    module, twin = Toy(), Toy()
    one, other = strategy_of(module, config), strategy_of(twin, config)
    take_step(module, one.optimizer)
    pieces = held(one.optimizer_pieces())
    assert {p.key for p in pieces} == {"step", "exp_avg", "exp_avg_sq"}
    write_pieces(tmp_path, pieces)
    twin.load_state_dict(module.state_dict())
    other.load_optimizer(OptimizerReader(tmp_path))
    for m, o in ((module, one), (twin, other)):
        take_step(m, o.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters()))
    write_pieces(tmp_path, [*pieces, Piece("gone", "exp_avg", torch.zeros(1))])
    with pytest.raises(ConfigError, match="does not belong to this model: gone is not a trainable parameter"):
        other.load_optimizer(OptimizerReader(tmp_path))
    write_pieces(tmp_path, [replace(p, tensor=torch.zeros(2)) if p.name == "head.bias" else p for p in pieces])
    with pytest.raises(ConfigError, match=r"head.bias is \(1,\) here and \(2,\) in the checkpoint"):
        other.load_optimizer(OptimizerReader(tmp_path))


def test_rows_that_several_processes_wrote_are_found(tmp_path):
    whole = torch.arange(14.0).reshape(7, 2)
    for writer, (first, stop) in enumerate([(0, 3), (3, 6), (6, 7)]):
        pieces = [Piece("w", "exp_avg", whole[first:stop], first, 7)]
        pieces += [Piece("w", "step", torch.tensor(4.0))] if writer == 0 else []
        write_pieces(tmp_path, held(pieces), writer, 3)
    reader = OptimizerReader(tmp_path)
    reader.check({"w": (7, 2)})
    assert torch.equal(reader.whole("w", "exp_avg"), whole) and reader.whole("w", "step") == 4
    for first in range(8):
        for stop in range(first, 8):
            assert torch.equal(reader.rows("w", "exp_avg", first, stop), whole[first:stop])
    with pytest.raises(ConfigError, match=r"w is \(8, 2\) here and \(7, 2\) in the checkpoint"):
        reader.check({"w": (8, 2)})


def test_a_rate_that_bfloat16_rounds_away_is_warned_about(tmp_path, caplog):
    for dtype, rate, warned in (("bfloat16", 1e-6, True), ("bfloat16", 1e-3, False), ("float32", 1e-6, False)):
        caplog.clear()
        build_optimizer(Toy(dtype=getattr(torch, dtype)), toy_config(tmp_path, learning_rate=rate))
        assert ("rounded away" in caplog.text) is warned
