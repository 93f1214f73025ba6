"""How much memory a run will need, term by term, before it starts: arithmetic on the recipe and the model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from llmrl.config.grpo import GRPOConfig
from llmrl.config.model import ModelFields
from llmrl.config.sft import SFTConfig
from llmrl.models.shape import ModelShape

_BYTES = {"float32": 4, "bfloat16": 2}
HEAD_BUFFERS = 3  # logits buffers of one chunk that are alive at once (functional/logprobs.py)


@dataclass(frozen=True)
class Term:
    """Bytes of one kind. `phase`: "always", or only while "training" or "sampling"."""

    name: str
    bytes: int
    phase: str
    why: str


@dataclass(frozen=True)
class MemoryEstimate:
    """Of one process; without what the framework itself takes (about 0.5 GiB for a CUDA context, allocator slack)."""

    terms: tuple[Term, ...]

    @property
    def peak(self) -> int:
        """Bytes that are alive at once, at most: gradients and activations are gone while sampling."""
        during = {
            phase: sum(t.bytes for t in self.terms if t.phase == phase) for phase in ("always", "training", "sampling")
        }
        return during["always"] + max(during["training"], during["sampling"])


def estimate_memory(
    config: SFTConfig | GRPOConfig,
    shape: ModelShape,
    *,
    microbatch_tokens: int,
    head_chunk_bytes: int,
    cache_tokens: int = 0,
    decode_rows: int = 0,
) -> MemoryEstimate:
    """The terms for one process (data-parallel ones hold the same each).

    microbatch_tokens: tokens of the largest microbatch. cache_tokens, decode_rows: key-value slots and rows of the local
    engine at its fullest. Activations are those of a Llama-like block (see `activation_bytes`); other families differ a little.
    """
    width = _BYTES[config.dtype]
    compute = 2 if config.mixed_precision != "no" else width
    weights = shape.parameters * width
    terms = [
        Term("weights", weights, "always", f"{shape.parameters:,} parameters in {config.dtype}"),
        Term(
            "optimizer",
            2 * shape.trainable * width,
            "always",
            f"two AdamW moments of {shape.trainable:,} trainable parameters",
        ),
        Term("gradients", shape.trainable * width, "training", "of the trainable parameters; freed after each update"),
    ]
    if config.mixed_precision != "no":
        terms.append(
            Term(
                "autocast",
                (shape.parameters - shape.embedding) * 2,
                "training",
                "16-bit copies of the weights, kept through a forward",
            )
        )
    if isinstance(config, GRPOConfig) and config.beta > 0 and shape.trainable == shape.parameters:
        terms.append(
            Term(
                "reference",
                weights,
                "always",
                "a frozen copy, since beta > 0 (with lora the adapter is switched off instead)",
            )
        )
    how = "recomputed layer by layer" if config.gradient_checkpointing else "kept for the backward"
    activations = activation_bytes(config, shape, microbatch_tokens)
    terms.append(Term("activations", activations, "training", f"{microbatch_tokens:,} tokens a microbatch, {how}"))
    terms.append(
        Term(
            "head", HEAD_BUFFERS * head_chunk_bytes, "training", f"{HEAD_BUFFERS} chunks of logits, whatever the batch"
        )
    )
    if isinstance(config, GRPOConfig):
        cache = cache_tokens * 2 * shape.layers * shape.kv_width * compute
        terms.append(
            Term("key-value cache", cache, "sampling", f"{cache_tokens:,} slots (rollout.max_batch_tokens bounds them)")
        )
        terms.append(
            Term(
                "sampling logits",
                3 * decode_rows * shape.vocab * 4,
                "sampling",
                f"{decode_rows:,} rows decoded at once",
            )
        )
    return MemoryEstimate(tuple(terms))


def activation_bytes(config: ModelFields, shape: ModelShape, tokens: int) -> int:
    """What autograd keeps of `tokens` tokens through all layers of a decoder with gated MLPs.

    A layer keeps the input and the normalised value of each norm in float32, the inputs of the projections, the rotated queries,
    keys and values with the attention's output, and of the MLP gate, activation, up and product. With gradient checkpointing:
    every layer's input, and all of one layer. Measured against autograd for Llama, Qwen 2 and Qwen 3 (tests/train/test_memory.py).
    """
    autocast = config.mixed_precision != "no"
    compute = 2 if autocast else _BYTES[config.dtype]
    # Autocast casts the input of each projection by itself: three copies before the attention, two before the MLP.
    inputs = 5 * shape.hidden * 2 if autocast else 2 * shape.hidden * compute
    norms = 2 * shape.norm_width * 4
    attention = 2 * (shape.query_width + shape.kv_width) * compute
    mlp = 4 * shape.intermediate * compute
    layer = inputs + norms + attention + mlp
    if not config.gradient_checkpointing:
        return tokens * shape.layers * layer
    return tokens * (shape.layers * shape.hidden * (4 if autocast else compute) + layer)
