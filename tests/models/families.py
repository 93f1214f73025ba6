"""Small models of many families, with windows that documents exceed, and documents to run through them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmrl.data.packing import pack
from llmrl.types import Example, PackedBatch

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
WINDOW = 5
ALTERNATING = ["sliding_attention", "full_attention"]

PACKED = {
    "qwen2": ("qwen2", {**SIZES, "use_sliding_window": False}),
    "qwen2-window": (
        "qwen2",
        {**SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 16}),
    "qwen3-moe": (
        "qwen3_moe",
        {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "llama": ("llama", {**SIZES, "attention_bias": True}),
    "llama-yarn": (
        "llama",
        {**SIZES, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}},
    ),
    "gemma": ("gemma", {**SIZES, "head_dim": 8}),
    "gemma2": (
        "gemma2",
        {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0, "layer_types": ALTERNATING},
    ),
    "gemma3_text": (
        "gemma3_text",
        {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    "mistral-window": ("mistral", {**SIZES, "head_dim": 8, "sliding_window": WINDOW}),
    "phi": ("phi", {**SIZES, "partial_rotary_factor": 0.5, "tie_word_embeddings": False}),
    "phi3-window": ("phi3", {**SIZES, "sliding_window": WINDOW, "tie_word_embeddings": False}),
    "granite": ("granite", {**SIZES, "logits_scaling": 3.0, "attention_multiplier": 0.3}),
    "cohere": ("cohere", {**SIZES, "logit_scale": 0.5}),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}),
}  # fmt: skip

ONE_BY_ONE = {
    "lfm2-conv": ("lfm2", {**SIZES, "layer_types": ["conv", "full_attention"]}),
    "mamba": ("mamba", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "gpt_oss-sinks": ("gpt_oss", {**SIZES, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": WINDOW}),
    "llama-dynamic": ("llama", {**SIZES, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "bloom-alibi": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "jamba": (
        "jamba",
        {**SIZES, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False},
    ),
}  # fmt: skip

LENGTHS = (1, 17, 2, 40, 3, 1, 9, 23)


def config_of(family: str):
    name, settings = {**PACKED, **ONE_BY_ONE}[family]
    return AutoConfig.for_model(name, **settings)


def make(family: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> torch.nn.Module:
    """A random model without dropout; biases are random too, or a lost one would not show."""
    torch.manual_seed(0)
    config = config_of(family)
    config._experts_implementation = "eager"  # torch's grouped product of experts has no float64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def examples(lengths=LENGTHS, share: float = 0.6) -> list[Example]:
    """Documents of random tokens, of which a share is in the loss, with a weight each."""
    rng = np.random.default_rng(1)
    made = []
    for unit, n in enumerate(lengths):
        mask = rng.random(n) < share
        mask[0] = False
        ids = rng.integers(3, VOCAB, n).astype(np.int32)
        made.append(Example(ids, mask, unit, {"weights": rng.normal(size=n)}))
    return made


def batch_of(lengths=LENGTHS, share: float = 0.6) -> PackedBatch:
    return pack(examples(lengths, share))


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients, taken away from the parameters."""
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    for p in module.parameters():
        p.grad = None
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((a - b).detach().norm() / b.norm().clamp_min(1e-300)) if a.numel() else 0.0


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest distance of two tensors of one name."""
    assert a.keys() == b.keys() and a
    return max(distance(a[n], b[n]) for n in a)
