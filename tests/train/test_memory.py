"""The memory estimate against what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from llmrl.config.dpo import DPOConfig
from llmrl.config.grpo import GRPOConfig
from llmrl.config.ppo import PPOConfig
from llmrl.config.reward_model import RewardConfig
from llmrl.config.sft import SFTConfig
from llmrl.models.shape import shape_of
from llmrl.train.memory import activation_bytes, estimate_memory

TOKENS = 512
BASE = {"model_name_or_path": "m", "output_dir": "o"}


def _model(family=Qwen2Config, **extra):
    config = family(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True, **extra,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float()


def _kept(model, autocast):
    """Bytes that autograd holds after a forward of the backbone, without parameters and their 16-bit copies."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters and TOKENS in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 1000, (1, TOKENS))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.model(input_ids=ids)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize(("family", "extra"), [(Qwen2Config, {}), (LlamaConfig, {}), (Qwen3Config, {"head_dim": 64})])
def test_activations(family, extra, mixed_precision):
    model = _model(family, **extra).train()
    config = SFTConfig(**BASE, mixed_precision=mixed_precision)
    estimate = activation_bytes(config, shape_of(model), TOKENS)
    assert estimate == pytest.approx(_kept(model, mixed_precision != "no"), rel=0.12)


def test_shape_counts_tied_weights_once_and_needs_no_memory():
    model = _model()
    shape = shape_of(model)
    assert shape.parameters == shape.trainable == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.query_width, shape.kv_width, shape.norm_width, shape.embedding) == (
        6,
        256,
        64,
        512,
        256_000,
    )
    with torch.device("meta"):
        assert shape_of(AutoModelForCausalLM.from_config(model.config)) == shape


def _bytes(config, **kw):
    shape = shape_of(_model())
    if config.lora is not None:
        shape = replace(shape, trainable=1000)
    estimate = estimate_memory(config, shape, microbatch_tokens=100, head_chunk_bytes=1000, **kw)
    return {t.name: t.bytes for t in estimate.terms}, estimate.peak


def test_terms_of_full_training():
    shape = shape_of(_model())
    terms, peak = _bytes(SFTConfig(**BASE))
    assert terms["weights"] == terms["gradients"] == 4 * shape.parameters
    assert terms["optimizer"] == 8 * shape.parameters
    assert terms["head"] == 1000 + 2 * 100 * 256 * 4  # one chunk, the hidden states and their gradient
    assert terms["head's gradient"] == 4 * 256_000
    assert peak == sum(terms.values()) - min(terms["head"], terms["a layer"])
    assert _bytes(SFTConfig(**BASE, dtype="bfloat16"))[0]["optimizer"] == 4 * shape.parameters


def test_entropies_take_a_second_chunk_and_16_bit_products_half_of_one():
    def chunks(config):
        grown = estimate_memory(config, shape_of(_model()), microbatch_tokens=10**6, head_chunk_bytes=3000)
        base = estimate_memory(config, shape_of(_model()), microbatch_tokens=10**6, head_chunk_bytes=1000)
        return sum(t.bytes for t in grown.terms) - sum(t.bytes for t in base.terms)

    bf16 = {"mixed_precision": "bf16"}
    assert [chunks(c) for c in (SFTConfig(**BASE), GRPOConfig(**BASE), SFTConfig(**BASE, **bf16))] == [2000, 4000, 3000]


def test_moments_in_8_bits_and_weights_in_4():
    shape = shape_of(_model())
    eight, _ = _bytes(SFTConfig(**BASE, optimizer="adamw_8bit"))
    rest = shape.parameters - shape.embedding
    assert eight["optimizer"] == int(2 * (rest * (1 + 4 / 256) + shape.embedding * 4))
    plain, _ = _bytes(SFTConfig(**BASE, lora={}))
    assert plain["weights"] == 4 * shape.parameters
    linear = 6 * (shape.layer_parameters - 512) - 1000  # two norms of 256 a layer; 1000 are the adapters'
    for kind, width in (("nf4", 0.5 + 65 / 64 / 64), ("int8", 1.0)):
        packed, _ = _bytes(SFTConfig(**BASE, lora={}, quantization=kind))
        assert packed["weights"] == pytest.approx(linear * width + 4 * (shape.parameters - linear), abs=2)
        assert packed["optimizer"] == plain["optimizer"] == 8000


def test_adapters_stay_in_float32_over_bfloat16():
    shape = shape_of(_model())
    terms, _ = _bytes(SFTConfig(**BASE, lora={}, dtype="bfloat16"))
    assert terms["weights"] == 2 * (shape.parameters - 1000) + 4000
    assert (terms["gradients"], terms["optimizer"]) == (4000, 8000)


def test_what_is_offloaded_is_on_the_host():
    shape, sizes = shape_of(_model()), {"microbatch_tokens": 10**4, "head_chunk_bytes": 10**6}
    here = estimate_memory(SFTConfig(**BASE), shape, **sizes)
    config = SFTConfig(**BASE, activation_offloading=True)
    away = estimate_memory(config, shape, **sizes)
    assert (here.host, away.host) == (0, activation_bytes(config, shape, 10**4))
    one_layer = (away.host - 10**4 * 2 * 256 * 4) // 6  # the last norm is no layer's
    assert here.peak - away.peak >= away.host - 2 * one_layer > 0
    assert estimate_memory(config, shape, **sizes, cuda=False).host == 0

    kept = estimate_memory(GRPOConfig(**BASE), shape, **sizes)
    moved = estimate_memory(GRPOConfig(**BASE, offload_reference=True), shape, **sizes)
    assert moved.host == kept.peak - moved.peak == 4 * shape.parameters


def test_a_reference_is_counted_only_where_there_is_one():
    assert "reference" in _bytes(GRPOConfig(**BASE))[0]
    assert "reference" not in _bytes(GRPOConfig(**BASE, beta=0.0))[0]
    assert "reference" not in _bytes(GRPOConfig(**BASE, lora={}))[0]


@pytest.mark.parametrize(
    ("config", "phase"),
    [
        (PPOConfig(**BASE), "always"),
        (PPOConfig(**BASE, lora={}), None),
        (PPOConfig(**BASE, preset="orz_ppo"), None),
        (PPOConfig(**BASE, preset="trpo_penalty"), None),
        (DPOConfig(**BASE), None),
        (DPOConfig(**BASE, reference_logprobs="on_the_fly"), "always"),
        (DPOConfig(**BASE, reference_logprobs="on_the_fly", lora={}), None),
        (DPOConfig(**BASE, sync_ref_model=True), "always"),
        (DPOConfig(**BASE, rewards="f"), "always"),
        (DPOConfig(**BASE, ref_model_name_or_path="r"), "before training"),
        (DPOConfig(**BASE, ref_model_name_or_path="r", reference_logprobs="on_the_fly", lora={}), "always"),
        (DPOConfig(**BASE, loss_type="orpo", reference_logprobs="on_the_fly"), None),
        (RewardConfig(**BASE), None),
    ],
)
def test_the_reference_of_each_kind(config, phase):
    shape = shape_of(_model())
    if config.lora is not None:
        shape = replace(shape, trainable=1000)
    estimate = estimate_memory(config, shape, microbatch_tokens=100, head_chunk_bytes=1000)
    assert [t.phase for t in estimate.terms if t.name == "reference"] == ([phase] if phase else [])


def test_a_separate_critic_is_a_second_model():
    shape = shape_of(_model())
    config = PPOConfig(**BASE, preset="orz_ppo")
    alone, _ = _bytes(config)
    terms, peak = _bytes(config, critic=shape, reward_model_bytes=77)
    assert {name: terms[f"critic: {name}"] for name in ("weights", "optimizer", "gradients", "activations")} == {
        name: terms[name] for name in ("weights", "optimizer", "gradients", "activations")
    }
    moment = max(alone["head"], 2 * alone["a layer"])
    one_of_each = alone["head"] + alone["a layer"] + alone["head's gradient"]
    assert peak == 2 * (sum(alone.values()) - one_of_each) + alone["head's gradient"] + moment + 77


def test_a_reward_model_has_no_logits():
    assert "head" not in _bytes(RewardConfig(**BASE))[0]


def test_sampling_and_training_do_not_add_up():
    terms, peak = _bytes(GRPOConfig(**BASE, beta=0.0), cache_tokens=10**6, decode_rows=10)
    always = terms["weights"] + terms["optimizer"]
    sampling = terms["key-value cache"] + terms["sampling logits"]
    assert terms["key-value cache"] == 10**6 * 2 * 6 * 64 * 4
    assert peak == always + sampling > always + terms["gradients"]


def test_checkpointing_and_microbatches_bound_activations():
    few = activation_bytes(SFTConfig(**BASE, gradient_checkpointing=True), shape_of(_model()), 100)
    all_of_it = activation_bytes(SFTConfig(**BASE), shape_of(_model()), 100)
    assert few < all_of_it / 3
    assert activation_bytes(SFTConfig(**BASE), shape_of(_model()), 200) == 2 * all_of_it
