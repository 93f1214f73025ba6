"""Models and tokenizers from disk or hub, adapters, references, and the way back to disk in Hugging Face's layout."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from llmrl.config.model import ModelFields
from llmrl.errors import ConfigError
from llmrl.models.source import Source, check_vocabulary, from_pretrained


def load_policy(config: ModelFields, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """(model in training mode, tokenizer) that a recipe names, with its adapter and gradient checkpointing.

    A directory or hub id with a LoRA adapter continues that adapter on its base model. Raises ConfigError, before weights are
    read where possible, for what is missing, incomplete or can't be trained.
    """
    source = Source(config)
    tokenizer = source.tokenizer()
    model = source.model()
    check_vocabulary(model, tokenizer)
    return for_training(config, source.adapted(model)).to(device), tokenizer


def for_training(config: ModelFields, model: Any) -> Any:
    """The model in training mode, with gradient checkpointing if asked for. Raises ConfigError where it can't."""
    if config.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"gradient_checkpointing: {error}") from error
    return model.train()


def load_skeleton(config: ModelFields) -> tuple[Any, Any]:
    """As `load_policy`, but the weights are on the "meta" device: shapes and settings in no time and no memory."""
    source = Source(config)
    tokenizer = source.tokenizer()
    with torch.device("meta"):
        model = source.skeleton()
        model.tie_weights()
        model.generation_config = source.generation_config() or model.generation_config
        check_vocabulary(model, tokenizer)
        return for_training(config, source.adapted(model, weights=False)), tokenizer


def load_reference(config: ModelFields, policy: nn.Module) -> Any:
    """What the policy is now, as a frozen copy; None with an adapter, since switching it off gives the reference."""
    if is_adapted(policy):
        return None
    return copy.deepcopy(policy).eval().requires_grad_(False)


def load_frozen(config: ModelFields, name: str, tokenizer: Any, *, weights: bool = True) -> Any:
    """The model `name` with the adapter that it may have, frozen, to score tokens of `tokenizer`; without `weights` on "meta".

    Raises ConfigError where it, or its own tokenizer if it has one, knows these tokens by other ids.
    """
    own = {"model_name_or_path": name, "model_revision": "main", "tokenizer_name_or_path": None, "chat_template": None}
    source = Source(config.model_copy(update={**own, "lora": None, "quantization": None}), key="ref_model_name_or_path")
    with nullcontext() if weights else torch.device("meta"):
        model = source.model() if weights else source.skeleton()
        model.tie_weights()
        model = source.adapted(model, weights)
    rows = model.get_input_embeddings().weight.shape[0]
    try:
        theirs = source.tokenizer().get_vocab()
    except ConfigError:  # a reference without a tokenizer
        theirs = {}
    other = next((t for t, i in tokenizer.get_vocab().items() if theirs.get(t, i) != i or i >= rows), None)
    if other is not None:
        raise ConfigError(
            f"ref_model_name_or_path: {name} has another tokenizer than the policy (the token {other!r} has another id, or none): it "
            "can't score the same tokens. Give a model of the same family"
        )
    return model.eval().requires_grad_(False)


def is_adapted(model: Any) -> bool:
    """Whether peft's adapters are around the model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, those that are attributes of attention layers and adapters included."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a completion: the generation config's, the tokenizer's, and what the chat template ends a turn with.

    Base models often name only their end of text, while their template ends the assistant's turn with another token.
    """
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = set(listed) if isinstance(listed, list | tuple) else {listed}
    stops |= {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    return tuple(sorted(int(s) for s in stops if s is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the template puts behind an assistant's answer, found by rendering one."""
    if not tokenizer.chat_template:
        return None
    answer = "llmrl"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:  # a template for other conversations than this one says nothing about this token
        return None
    _, found, tail = text.rpartition(answer)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found and tail else []
    added = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return ids[0] if added is not None and added.special else None


def save_model(model: Any, tokenizer: Any, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes the model (the adapter alone, where there is one), its generation config and the tokenizer in the usual layout.

    `state_dict` replaces the model's own tensors, for a backend that gathered them.
    """
    extra = (
        {"save_embedding_layers": False} if is_adapted(model) else {}
    )  # peft would ask the hub for the base's vocabulary
    model.save_pretrained(directory, state_dict=state_dict, **extra)
    tokenizer.save_pretrained(directory)


def read_weights(model: Any, directory: str | Path) -> dict[str, Tensor]:
    """What `save_model` wrote of a model of this kind, by the names of `model.state_dict()`, on the host.

    Raises ConfigError where an adapter has other tensors than the model's.
    """
    if not is_adapted(model):
        return dict(from_pretrained(type(model), str(directory), dtype=model.dtype, config=model.config).state_dict())
    from peft import get_peft_model_state_dict, load_peft_weights

    # peft names tensors in its own way: it is asked to name numbers, so that its way is known for certain.
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    numbers = {name: torch.tensor(i) for i, name in enumerate(names)}
    saved_as = get_peft_model_state_dict(model, state_dict=numbers, save_embedding_layers=False)
    loaded = load_peft_weights(str(directory), device="cpu")
    wrong = sorted(saved_as.keys() ^ loaded.keys())
    if wrong:
        raise ConfigError(f"{directory}: the adapter does not fit this model; {len(wrong)} tensors, {wrong[0]} first")
    return {names[int(number)]: loaded[name] for name, number in saved_as.items()}
