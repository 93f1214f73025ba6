"""How much memory a run will need, term by term, before it starts: arithmetic on the recipe and the model's shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmrl.config.dpo import DPOConfig
from llmrl.config.grpo import GRPOConfig
from llmrl.config.model import ModelFields
from llmrl.config.ppo import PPOConfig
from llmrl.config.reward_model import RewardConfig
from llmrl.models.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2}
_QUANTISED = {
    "nf4": 0.5 + (1 + 4 / 256) / 64,
    "int8": 1.0,
}  # bytes a weight; of nf4 with a code for 64 weights and a scale for 256 codes
LOGITS_AT_ONCE = 2**26  # of the local engine
AT_HEAD, IN_LAYER, HOST = "training, at the head", "training, in a layer", "host memory"


@dataclass(frozen=True)
class Term:
    """Bytes of one kind. `phase` is when they are alive.

    "always", "before training", "scoring", "sampling" or "training", or a moment of training: AT_HEAD (the end of a forward) or IN_LAYER
    (a layer's backward). Those of HOST are not on the device at all.
    """

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
        """Bytes of the device that are alive at once, at most: gradients and activations are gone while sampling."""
        during = self._during()
        during.pop(HOST, 0)
        always, moment = during.pop("always", 0), max(during.pop(AT_HEAD, 0), during.pop(IN_LAYER, 0))
        return always + max([during.pop("training", 0) + moment, *during.values()])

    @property
    def host(self) -> int:
        """Bytes that were moved to host memory."""
        return self._during().get(HOST, 0)

    def _during(self) -> dict[str, int]:
        during: dict[str, int] = {}
        for term in self.terms:
            during[term.phase] = during.get(term.phase, 0) + term.bytes
        return during


def estimate_memory(
    config: ModelFields,
    shape: ModelShape,
    *,
    microbatch_tokens: int,
    head_chunk_bytes: int,
    cache_tokens: int = 0,
    decode_rows: int = 0,
    critic: ModelShape | None = None,
    reward_model_bytes: int = 0,
    cuda: bool = True,
) -> MemoryEstimate:
    """The terms for one process (data-parallel ones hold the same each).

    microbatch_tokens: tokens of the largest microbatch; an update is taken to have several, so that gradients are there from the first on.
    head_chunk_bytes: one buffer of logits at its largest. cache_tokens, decode_rows: key-value slots and rows of the local engine at its
    fullest. critic: the shape of a separate one. reward_model_bytes: weights of the reward models. cuda: whether the device has memory of
    its own; without, nothing is offloaded. Activations are those of a Llama-like block (see `activation_bytes`); other families differ a little.
    """
    terms = _learner(config, shape, microbatch_tokens, cuda=cuda)
    terms += _reference(config, shape, cuda)
    if critic is not None:
        terms += _learner(config, critic, microbatch_tokens, "critic: ", cuda=cuda)
    if reward_model_bytes:
        terms.append(Term("reward models", reward_model_bytes, "always", "frozen, to score with"))
    if not isinstance(config, RewardConfig):  # a score is one number a text: no logits
        terms += _head(config, shape, microbatch_tokens, head_chunk_bytes)
    if cache_tokens:
        cache = cache_tokens * 2 * shape.layers * shape.kv_width * _compute_bytes(config)
        slots = f"{cache_tokens:,} slots (rollout.max_batch_tokens bounds them)"
        terms.append(Term("key-value cache", cache, "sampling", slots))
        logits = 3 * min(decode_rows * shape.vocab, max(shape.vocab, LOGITS_AT_ONCE)) * 4
        terms.append(Term("sampling logits", logits, "sampling", f"{decode_rows:,} rows decoded at once"))
    return MemoryEstimate(tuple(terms))


def _compute_bytes(config: ModelFields) -> int:
    return 2 if config.mixed_precision != "no" else BYTES[config.dtype]


def _full(shape: ModelShape) -> bool:
    """Every parameter learns: there are no adapters."""
    return shape.trainable == shape.parameters


def _trained_bytes(config: ModelFields, shape: ModelShape) -> int:
    """Of one parameter that learns; peft keeps adapters in float32 whatever the model is in."""
    return BYTES[config.dtype] if _full(shape) else 4


def _learner(config: ModelFields, shape: ModelShape, tokens: int, whose: str = "", *, cuda: bool) -> list[Term]:
    """What a model that learns takes."""
    width = _trained_bytes(config, shape)
    gradients = "of the trainable parameters; freed after each update"
    terms = [
        _weights(config, shape),
        _optimizer(config, shape, width),
        Term("gradients", shape.trainable * width, "training", gradients),
    ]
    if config.mixed_precision != "no" and (copies := _cast_parameters(config, shape)):
        terms.append(Term("autocast", copies * 2, "training", "16-bit copies of the weights, kept through a forward"))
    terms += _activations(config, shape, tokens, cuda)
    return [replace(term, name=whose + term.name) for term in terms]


def _quantised(shape: ModelShape) -> int:
    """Weights of the linear layers under the adapters."""
    return shape.layers * (shape.layer_parameters - shape.norm_width) - shape.trainable


def _weights(config: ModelFields, shape: ModelShape) -> Term:
    width = BYTES[config.dtype]
    frozen = shape.parameters - (0 if _full(shape) else shape.trainable)
    adapters = (shape.parameters - frozen) * 4
    if config.quantization is None:
        why = f"{shape.parameters:,} parameters in {config.dtype}"
        return Term("weights", frozen * width + adapters, "always", why)
    packed = _quantised(shape)
    size = int(packed * _QUANTISED[config.quantization]) + (frozen - packed) * width + adapters
    why = f"{packed:,} parameters in {config.quantization}, {frozen - packed:,} in {config.dtype}, adapters in float32"
    return Term("weights", size, "always", why)


def _optimizer(config: ModelFields, shape: ModelShape, width: int) -> Term:
    """Two moments. In 8 bits they have a scale for 256 elements, and those of embeddings stay in 32 (see train/optim.py)."""
    moments = f"two AdamW moments of {shape.trainable:,} trainable parameters"
    if getattr(config, "optimizer", "adamw") == "adamw":
        return Term("optimizer", 2 * shape.trainable * width, "always", moments)
    wide = shape.embedding if _full(shape) else 0
    size = int(2 * ((shape.trainable - wide) * (1 + 4 / 256) + wide * 4))
    return Term("optimizer", size, "always", f"{moments}, in 8 bits but for embeddings")


def _cast_parameters(config: ModelFields, shape: ModelShape) -> int:
    """How many parameters have a 16-bit copy at once. Without checkpointing, frozen weights too: their copies are kept for the backward."""
    if config.quantization is not None:  # they are widened for each product
        return 0 if config.gradient_checkpointing else shape.trainable
    if _full(shape) or not config.gradient_checkpointing:
        return shape.parameters - shape.embedding
    return shape.layer_parameters


def _tied(shape: ModelShape) -> bool:
    return shape.parameters < shape.layers * shape.layer_parameters + shape.embedding + shape.head


def _head(config: ModelFields, shape: ModelShape, tokens: int, chunk_bytes: int) -> list[Term]:
    """What functional/logprobs.py holds: a buffer of logits, a second one for entropies, half of one where products are in 16 bits.

    A head that learns has its gradient summed up in float32. Where it is the embedding's matrix as well, autograd keeps that sum until
    the embedding's own gradient is there, at the end of the backward; and autocast makes a copy for the head alone.
    """
    chunk = min(chunk_bytes, tokens * shape.vocab * 4)
    buffers = 2.0 if isinstance(config, GRPOConfig | PPOConfig) else 1.0
    buffers += 0.5 if _compute_bytes(config) == 2 else 0
    size = int(buffers * chunk) + 2 * tokens * shape.hidden * 4
    if config.mixed_precision != "no" and (_tied(shape) or not _full(shape)):
        size += shape.head * 2
    why = f"{buffers:g} chunks of logits, whatever the batch, and hidden states"
    terms = [Term("head", size, AT_HEAD, why)]
    if _full(shape):
        phase, until = ("training", "until that of the embedding is there") if _tied(shape) else (AT_HEAD, "summed up")
        terms.append(Term("head's gradient", shape.head * 4, phase, f"of one microbatch, in float32, {until}"))
    return terms


def _reference(config: ModelFields, shape: ModelShape, cuda: bool) -> list[Term]:
    """The frozen copy that a KL or a preference is relative to; with lora the adapter is switched off instead."""
    weights, full = shape.parameters * BYTES[config.dtype], _full(shape)
    always = [Term("reference", weights, "always", "a frozen model beside the policy")]
    if getattr(config, "offload_reference", False) and cuda:
        always = [
            Term("reference", weights, HOST, "a frozen model; offload_reference"),
            Term("reference", weights, "scoring", "while it scores"),
        ]
    if isinstance(config, GRPOConfig) and config.beta > 0 and full:
        return always
    if isinstance(config, PPOConfig) and config.needs_reference and full:
        return always
    if not isinstance(config, DPOConfig) or config.reference_free:
        return []
    other = config.ref_model_name_or_path is not None
    precomputed = config.reference_logprobs == "precompute" and not (config.sync_ref_model or config.rewards)
    if other and precomputed:
        return [Term("reference", weights, "before training", "for one pass; taken to be as large as the policy")]
    if precomputed or not (other or full):
        return []
    return always


def _activations(config: ModelFields, shape: ModelShape, tokens: int, cuda: bool) -> list[Term]:
    """What waits for the backward, and what one layer's backward takes beside it."""
    how = "recomputed layer by layer" if config.gradient_checkpointing else "kept for the backward"
    why = f"{tokens:,} tokens a microbatch, {how}"
    compute = _compute_bytes(config)
    # Gradients of an MLP's product, gate and up, and of the residual stream; with 16-bit products as large again, cast back.
    working = tokens * (2 * shape.intermediate + 2 * shape.hidden) * compute
    one = _layer_bytes(config, shape, cuda) * tokens
    kept = activation_bytes(config, shape, tokens, cuda=cuda)
    if config.activation_offloading and cuda:
        moved = "in page-locked memory until the backward of its layer"
        terms = [Term("activations", kept, HOST, f"{tokens:,} tokens a microbatch, {moved}")]
        working += one
    else:
        terms = [Term("activations", kept, "training", why)]
        if config.gradient_checkpointing:
            working += one
    if config.quantization is not None:
        working += shape.hidden * shape.intermediate * compute
    return [*terms, Term("a layer", working, IN_LAYER, "what its backward works with")]


def _layer_bytes(config: ModelFields, shape: ModelShape, cuda: bool) -> int:
    """What autograd keeps of one token through one layer."""
    autocast = config.mixed_precision != "no"
    compute = _compute_bytes(config)
    # Autocast casts the input of each projection by itself: three copies before the attention, two before the MLP.
    inputs = 5 * shape.hidden * 2 if autocast else 2 * shape.hidden * compute
    norms = 2 * shape.norm_width * 4
    attention = 2 * (shape.query_width + shape.kv_width) * compute
    if not cuda:  # attention runs one document at a time, and what it keeps of each is put together once more
        attention += shape.query_width * compute
    return inputs + norms + attention + 4 * shape.intermediate * compute


def activation_bytes(config: ModelFields, shape: ModelShape, tokens: int, *, cuda: bool = True) -> int:
    """What autograd keeps of `tokens` tokens through all layers of a decoder with gated MLPs, and of its last norm.

    A layer keeps the input and the normalised value of each norm in float32, the inputs of the projections, the rotated queries,
    keys and values with the attention's output, and of the MLP gate, activation, up and product. With gradient checkpointing:
    every layer's input. Measured against autograd for Llama, Qwen 2 and Qwen 3 (tests/train/test_memory.py).
    """
    last = 2 * shape.hidden * 4
    if config.gradient_checkpointing:
        return tokens * (
            shape.layers * shape.hidden * (4 if config.mixed_precision != "no" else _compute_bytes(config)) + last
        )
    return tokens * (shape.layers * _layer_bytes(config, shape, cuda) + last)
