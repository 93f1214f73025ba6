"""Quantised weights under an adapter compute what a plain model with the dequantised weights computes; what can't work is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llmrl.config.model import ModelFields
from llmrl.config.reward_model import RewardConfig
from llmrl.errors import ConfigError
from llmrl.models.forward import PolicyModule
from llmrl.models.load import load_policy, read_weights, save_model
from llmrl.models.quantize import is_quantized, plain_weights, quantization_config
from llmrl.models.scorer import load_scorer
from llmrl.models.source import new_adapter
from llmrl.models.weights import ModelWeights
from tests.models.families import batch_of, gradients


def fields(path, **changes) -> ModelFields:
    return ModelFields(**{"model_name_or_path": str(path), "quantization": "nf4", "lora": {"r": 4}, **changes})


def test_without_an_adapter_it_is_refused(tiny_model_dir):
    with pytest.raises(ConfigError, match=r"quantization: nf4 freezes the weights, .* add `lora: \{r: 16\}`"):
        load_policy(fields(tiny_model_dir, lora=None))


def test_without_bitsandbytes_it_is_refused(monkeypatch, tiny_model_dir):
    monkeypatch.setattr("llmrl.models.quantize.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"quantization: int8 needs bitsandbytes, .*pip install bitsandbytes"):
        load_policy(fields(tiny_model_dir, quantization="int8"))
    assert load_policy(fields(tiny_model_dir, quantization=None))


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"mixed_precision": "bf16"}, torch.bfloat16),
        ({"mixed_precision": "fp16", "dtype": "bfloat16"}, torch.float16),
    ],
)
def test_products_are_in_the_recipes_precision(monkeypatch, changes, dtype):
    monkeypatch.setattr("llmrl.models.quantize.find_spec", lambda name: True)
    settings = quantization_config(fields("m", **changes), adapted=True)
    assert settings.bnb_4bit_compute_dtype == dtype
    assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: quantised weights are not tested")


def _train(module: nn.Module) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def _plain_twin(model, lora):
    """A plain model with what the quantised one computes with, and the same adapter."""
    base = model.get_base_model()
    twin = AutoModelForCausalLM.from_config(base.config)
    weights = {n: p for n, p in base.state_dict().items() if "lora" not in n and not n.endswith("SCB")}
    for name, module in base.named_modules():
        if hasattr(module, "get_base_layer") and is_quantized(module.get_base_layer()):
            weights |= {f"{name}.{key}": t for key, t in plain_weights(module, merge=False).items()}
    found = twin.load_state_dict({k: v for k, v in weights.items() if k in twin.state_dict()})
    assert not found.missing_keys
    twin = new_adapter(twin, lora, 0)
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    twin.load_state_dict(trained, strict=False)
    assert trained.keys() <= dict(twin.named_parameters()).keys()
    return twin.train()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_log_probs_and_gradients_are_those_of_the_dequantised_model(bnb, tiny_model_dir, quantization, dora):
    config = fields(tiny_model_dir, quantization=quantization, lora={"r": 4, "use_dora": dora})
    model, _ = load_policy(config)
    linear = [m for m in model.modules() if is_quantized(m)]
    assert len(linear) == 14 and not any(p.requires_grad for m in linear for p in m.parameters())
    assert type(model.get_output_embeddings()) is nn.Linear
    plain = dict(AutoModelForCausalLM.from_pretrained(tiny_model_dir).named_parameters())
    up = plain_weights(model.get_base_model().model.layers[0].mlp.up_proj, merge=False)["weight"]
    wanted = plain["model.layers.0.mlp.up_proj.weight"]
    error = (up - wanted).norm() / wanted.norm()
    assert (
        (0.05 < error < 0.15) if quantization == "nf4" else (0.001 < error < 0.02)
    )  # it is quantised, and little is lost
    _train(model)
    got, want = PolicyModule(model), PolicyModule(_plain_twin(model, config.lora))
    scores = [module(batch_of(), entropy=True) for module in (got, want)]
    assert torch.allclose(scores[0].logprobs, scores[1].logprobs, atol=1e-4)
    for s in scores:
        (s.logprobs.sum() + s.entropy.sum()).backward()
    ours, theirs = gradients(got), gradients(want)
    assert ours.keys() == theirs.keys() and all("lora_" in name for name in ours)
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm() + 1e-6, name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_weights_compute_what_the_adapted_model_does(bnb, tiny_model_dir, quantization, dora):
    model, _ = load_policy(fields(tiny_model_dir, quantization=quantization, lora={"r": 4, "use_dora": dora}))
    _train(model)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    x = torch.randn(5, 48)
    merged = plain_weights(layer, merge=True)
    assert torch.allclose(layer(x), nn.functional.linear(x, merged["weight"], merged["bias"]), atol=1e-4)
    assert not layer.merged and not torch.equal(merged["weight"], plain_weights(layer, merge=False)["weight"])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=["all", "some"])
def test_the_stream_for_engines_is_a_plain_model_that_computes_the_same(bnb, tiny_model_dir, quantization, targets):
    lora = {"r": 4, "target_modules": targets}
    model, _ = load_policy(fields(tiny_model_dir, quantization=quantization, lora=lora))
    _train(model)
    weights = ModelWeights(model)
    assert weights.adapter_rank is None and weights.merged_because == "quantised weights"
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    shapes = {n: p.shape for n, p in plain.named_parameters()}
    assert {n: t.shape for n, t in weights} == {n: t.shape for n, t in weights.base()} == shapes
    for stream, reference in ((weights, False), (weights.base(), True)):
        plain.load_state_dict(dict(stream), strict=False)
        want = PolicyModule(model)(batch_of(), reference=reference).logprobs
        assert torch.allclose(PolicyModule(plain)(batch_of()).logprobs, want, atol=1e-4)


def test_an_adapter_comes_back_and_may_be_continued(bnb, tiny_model_dir, tmp_path):
    model, tokenizer = load_policy(fields(tiny_model_dir, gradient_checkpointing=True))
    _train(model)
    want = PolicyModule(model)(batch_of()).logprobs
    want.sum().backward()
    assert gradients(model)
    save_model(model, tokenizer, tmp_path / "a")
    assert not (tmp_path / "a" / "model.safetensors").exists()
    fresh, _ = load_policy(fields(tiny_model_dir))
    fresh.load_state_dict(read_weights(fresh, tmp_path / "a"), strict=False)
    assert torch.equal(PolicyModule(fresh)(batch_of()).logprobs, want)
    continued, _ = load_policy(fields(tmp_path / "a", lora=None))
    assert torch.equal(PolicyModule(continued)(batch_of()).logprobs, want)
    assert sum(is_quantized(m) for m in continued.modules()) == 14


def test_a_reward_models_score_layer_is_left_alone(bnb, tiny_model_dir, tmp_path):
    config = RewardConfig(
        model_name_or_path=str(tiny_model_dir), output_dir=str(tmp_path), lora={"r": 4}, quantization="nf4"
    )
    model, _ = load_scorer(config)
    assert sum(is_quantized(m) for m in model.modules()) == 14
    scores = [m for n, m in model.named_modules() if n.endswith("score.modules_to_save.default")]
    assert [type(m) for m in scores] == [nn.Linear]
