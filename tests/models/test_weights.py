"""The policy's weights as engines take them: names, values, and which adapters can be sent alone."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llmrl.models.weights import ModelWeights

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def adapted(model, **config):
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **config}
    model = get_peft_model(model, LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return model


def test_a_plain_models_weights_are_its_checkpoints(model):
    weights = ModelWeights(model)
    named = dict(weights)
    assert named.keys() == dict(model.named_parameters()).keys()  # the head is tied and comes once
    assert all(named[n] is not p and torch.equal(named[n], p) for n, p in model.named_parameters())
    assert dict(weights.base()).keys() == named.keys(), "and again: each iteration is a fresh pass"
    assert weights.adapter_rank is None and weights.merged_because == ""


def test_merged_and_base_weights_of_an_adapter(model, tiny_model_dir):
    original = {n: p.clone() for n, p in model.named_parameters()}
    weights = ModelWeights(adapted(model))
    assert weights.adapter_rank == 4
    base, merged = dict(weights.base()), dict(weights)
    assert base.keys() == merged.keys() == original.keys()
    for name, parameter in original.items():
        assert torch.equal(base[name], parameter), name
        assert torch.equal(merged[name], parameter) != any(f"{m}.weight" in name for m in LINEAR), name
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    plain.load_state_dict(merged, strict=False)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(plain(ids).logits, weights._model(ids).logits, atol=1e-5, rtol=0)


def test_the_saved_adapter_is_peft_s(model, tiny_model_dir, tmp_path):
    policy = adapted(model, use_rslora=True)
    ModelWeights(policy).adapter()(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path).eval()
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, policy(ids).logits)


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({"use_rslora": True}, 4),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 3}}, 8),
        ({"layers_to_transform": [1]}, 4),
        ({"target_modules": "all-linear"}, 4),
        ({"init_lora_weights": "gaussian"}, 4),
        ({"init_lora_weights": False}, 4),
    ],
)
def test_adapters_that_can_be_sent_alone(model, config, rank):
    weights = ModelWeights(adapted(model, **config))
    assert (weights.adapter_rank, weights.merged_because) == (rank, "")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "factors of model.embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "factors of lm_head"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_have_to_be_merged(model, config, why):
    weights = ModelWeights(adapted(model, **config))
    assert weights.adapter_rank is None
    assert why in weights.merged_because
