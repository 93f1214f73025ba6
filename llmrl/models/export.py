"""Models out: merged or an adapter alone, cast and sharded, in the layout that transformers and vLLM load unchanged."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmrl.config.model import ModelFields
from llmrl.errors import ConfigError
from llmrl.models.load import load_skeleton, stop_token_ids
from llmrl.models.scorer import load_scorer, load_scorer_skeleton, set_pad_token
from llmrl.models.source import Source, check_vocabulary, from_pretrained
from llmrl.models.weights import ModelWeights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SIZE = re.compile(r"\d+(\.\d+)? ?(KB|MB|GB|TB)", re.IGNORECASE)


@dataclass(frozen=True)
class Exported:
    """What was written: the model's task as peft names it, numbers of elements by tensor type, and of an adapter the base."""

    task: str
    elements: dict[str, int]
    base: str | None = None
    not_for_vllm: str = ""
    """What vLLM can't take in the adapter; empty when nothing, and for a whole model."""


def write_export(
    name: str, directory: Path, *, merge: bool = False, dtype: str | None = None, max_shard_size: str = "5GB"
) -> Exported:
    """Writes the model `name` (a directory or hub id) with tokenizer and generation config into the new `directory`.

    An adapter stays one, or with `merge` becomes a part of its base's weights, which is computed in float32. `dtype` is one of DTYPES;
    None: as the model was saved, and for a merged one as its base was. Raises ConfigError for what is not whole, does not fit
    together or can't be held in the type.
    """
    if not _SIZE.fullmatch(max_shard_size):
        raise ConfigError(
            f"max_shard_size {max_shard_size!r} is no size; write a number with KB, MB, GB or TB, like 5GB"
        )
    fields = ModelFields(model_name_or_path=name)
    source = Source(fields, task=None, key="source")
    if source.adapter is None and source.has_score:
        source = Source(fields, task="SEQ_CLS", key="source")
    if merge:
        _require_mergeable(source)
    wanted = None if dtype is None else DTYPES[dtype]
    if source.adapter is not None and not merge:
        return _write_adapter(source, directory, wanted)
    if getattr(source.config, "quantization_config", None):
        raise ConfigError(
            f"{source.base} is quantized: its weights can't be cast or merged into. Give the model that it was made from"
            + (", as `base_model_name_or_path` of the adapter's adapter_config.json" if merge else "")
        )
    model, tokenizer = _whole(source)
    _cast(model, wanted or source.config.dtype or torch.float32)
    if source.task == "CAUSAL_LM" and model.generation_config is not None:
        _name_stops(model, tokenizer)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    _readable(directory)
    return Exported(source.task, _elements(dict(model.named_parameters())))


def _whole(source: Source) -> tuple[Any, Any]:
    """(model without adapters, tokenizer), in float32 where there was something to merge."""
    if source.task == "SEQ_CLS":
        model, tokenizer = load_scorer(source.fields, train=False, key="source")
    else:
        tokenizer = source.tokenizer()
        if source.adapter is None:  # in its own type, which takes the least memory
            model = from_pretrained(
                AutoModelForCausalLM,
                source.base,
                key="source",
                dtype=source.config.dtype or torch.float32,
                **source.hub,
            )
        else:
            model = source.model()
        check_vocabulary(model, tokenizer)
        model = source.adapted(model)
    if source.adapter is not None:
        model = _merged(model, source.adapter)
        if source.task == "SEQ_CLS":
            set_pad_token(model, tokenizer)
    return model.eval(), tokenizer


def _require_mergeable(source: Source) -> None:
    from peft import PeftConfig

    if source.adapter is None:
        raise ConfigError(f"{source.base} has no adapter_config.json: there is nothing to merge. Leave `--merge` out")
    config = PeftConfig.from_pretrained(source.adapter, revision=source.fields.model_revision)
    if config.is_prompt_learning:
        raise ConfigError(
            f"{source.adapter} is a {getattr(config.peft_type, 'value', config.peft_type)} adapter, which is no part of any weight: "
            "it can't be merged"
        )


def _merged(adapted: Any, adapter: str) -> Any:
    _untie(adapted.get_base_model())
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # not finite numbers
        raise ConfigError(f"{adapter} can't be merged: {error}") from error


def _untie(model: Any) -> None:
    """Factors on tied embeddings, or on the head tied to them, change one of the two alone; merged into both they would change both."""
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    factored = [hasattr(layer, "get_delta_weight") for layer in (model.get_input_embeddings(), head)]
    if not text.tie_word_embeddings or head is None or not any(factored):
        return
    plain = head.get_base_layer() if factored[1] else head
    plain.weight = nn.Parameter(plain.weight.detach().clone())
    text.tie_word_embeddings = model.config.tie_word_embeddings = False


def _write_adapter(source: Source, directory: Path, dtype: torch.dtype | None) -> Exported:
    """The adapter's own tensors, after a look at whether they fit the base, whose weights are not read."""
    from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights

    assert source.adapter is not None
    load = load_scorer_skeleton if source.task == "SEQ_CLS" else load_skeleton
    model, tokenizer = load(source.fields)
    tensors = load_peft_weights(source.adapter, device="cpu", revision=source.fields.model_revision)
    expected = {n: t.shape for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    found = {n: t.shape for n, t in tensors.items()}
    if wrong := sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n)):
        raise ConfigError(
            f"the adapter {source.adapter} does not fit its base {source.base}: {len(wrong)} tensors, {wrong[0]} first "
            f"(adapter: {_shape(found, wrong[0])}, base: {_shape(expected, wrong[0])})"
        )
    cast = {n: _checked(n, t, dtype) for n, t in tensors.items()}
    config = PeftConfig.from_pretrained(source.adapter, revision=source.fields.model_revision)
    if Path(source.base).is_dir():  # the adapter must find its base from any working directory
        config.base_model_name_or_path = str(Path(source.base).resolve())
    directory.mkdir()
    config.save_pretrained(directory)
    save_file(cast, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    if source.task == "CAUSAL_LM" and model.generation_config is not None:
        _name_stops(model, tokenizer)
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _readable(directory)
    return Exported(source.task, _elements(cast), config.base_model_name_or_path, ModelWeights(model).merged_because)


def _readable(directory: Path) -> None:
    """safetensors keeps its files from everyone else; a model that is handed on has the rights of its other files."""
    mode = (directory / "tokenizer_config.json").stat().st_mode
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)


def _name_stops(model: Any, tokenizer: Any) -> None:
    """Every token that ended a completion in training ends one elsewhere: a base model often names its end of text alone."""
    stops = stop_token_ids(model, tokenizer)
    if stops:
        model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else list(stops)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """In place, a tensor at a time, so that no second copy of the model is held."""
    for name, parameter in model.named_parameters():
        parameter.data = _checked(name, parameter.data, dtype)
    model.to(dtype)  # buffers, and what the model says of itself


def _checked(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in that type. Raises ConfigError where it has a value that is not finite there."""
    if not tensor.is_floating_point():
        return tensor
    cast = tensor if dtype is None else tensor.to(dtype)
    if cast.isfinite().all():
        return cast.contiguous()
    if not tensor.isfinite().all():
        raise ConfigError(
            f"{name} has values that are not finite numbers, so the model can't be used: training diverged"
        )
    largest = float(tensor.abs().max())
    raise ConfigError(f"{name} has a value of {largest:.3g}, too large for {cast.dtype}; use --dtype bf16 or fp32")


def _elements(tensors: dict[str, Tensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        counts[kind] = counts.get(kind, 0) + math.prod(tensor.shape)
    return counts


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"
