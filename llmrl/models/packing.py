"""Which models can be packed: decided from the configuration and the class, before any weight is read."""

from __future__ import annotations

from typing import Any, Literal

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llmrl.errors import ConfigError

Packing = Literal["packed", "one_by_one"]

_LAYERS = {"full_attention", "sliding_attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_UNUSUAL = {
    "diffllama",
    "doge",
    "nemotron",
}  # claim the attention interface, but add masks, call twice or drop keywords


def packing_support(config: Any, model_class: type | None = None) -> Packing:
    """How a model's documents go through it: "packed" (end to end, in one forward) or "one_by_one".

    Packed needs the attention interface, nothing but causal full or sliding attention between tokens, no attention sinks, and
    positions that do not depend on the sequence's length. Recurrent and convolutional hybrids, ALiBi, and dynamic or long RoPE run
    one document at a time. `model_class` defaults to the causal language model that transformers has for this configuration.
    Raises ConfigError for what is no causal language model: encoder-decoders, encoders, models with images or sound.
    """
    text = config.get_text_config()
    model_class = model_class or _causal_lm(config)
    refusal = _refusal(config, text, model_class)
    if refusal:
        raise ConfigError(
            f"{config.model_type!r} {refusal}; llmrl trains causal language models over text. Give another model_name_or_path."
        )
    return "one_by_one" if _obstacle(text, model_class) else "packed"


def sliding_layers(config: Any) -> int:
    """How many attention layers have a sliding window, by the configuration."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return sum(kind == "sliding_attention" for kind in kinds)
    windowed = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    return text.num_hidden_layers if windowed else 0


def _causal_lm(config: Any) -> type | None:
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _refusal(config: Any, text: Any, model_class: type | None) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    if text is not config or any(hasattr(config, f"{kind}_config") for kind in ("vision", "audio")):
        return "takes images or sound beside text"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        return "attends to later tokens"
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if model_class is None and not remote:
        return "has no causal language model in transformers"
    return ""


def _obstacle(text: Any, model_class: type | None) -> str:
    """Why the model can't be packed; empty where it can."""
    if model_class is None or not getattr(model_class, "_supports_attention_backend", False):
        return "its attention can't be replaced"
    if text.model_type in _UNUSUAL:
        return "it uses the attention interface in its own way"
    if not getattr(model_class, "_supports_sdpa", False):
        return "its attention is not plain (attention sinks, for example)"
    if getattr(model_class, "_is_stateful", False):
        return "it has recurrent layers"
    other = set(getattr(text, "layer_types", None) or ()) - _LAYERS
    if other:
        return f"it has layers of another kind: {', '.join(sorted(other))}"
    if getattr(text, "alibi", False):
        return "its position bias (ALiBi) is added to attention scores"
    rope = getattr(text, "rope_parameters", None) or {}
    per_layer = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    if any(r.get("rope_type") in _LENGTH_DEPENDENT_ROPE for r in per_layer):
        return "its rotary positions depend on the sequence's length"
    return ""
