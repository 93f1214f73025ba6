"""Reward models and critics from disk or hub: sequence classifiers with one label, which transformers alone scores alike."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from llmrl.config.model import ModelFields
from llmrl.config.ppo import PPOConfig
from llmrl.errors import ConfigError
from llmrl.models.load import for_training, stop_token_ids
from llmrl.models.source import Source, check_vocabulary

logger = logging.getLogger("llmrl")

_UNUSED = ("pad", "reserved", "unused")
_NEW_PAD = "<|pad{}|>"


def load_scorer(
    config: ModelFields,
    device: torch.device | str | None = None,
    *,
    ids_that_end: Iterable[int] = (),
    train: bool = True,
    key: str = "model_name_or_path",
) -> tuple[Any, Any]:
    """(`...ForSequenceClassification` with one label, tokenizer) from a reward model, or to train one from a causal language model.

    A language model gets a score layer from N(0, 1 / (hidden size + 1)) (Stiennon et al. 2020, arXiv 2009.01325), drawn with the
    recipe's seed. With `lora` that layer is trained in full and saved in the adapter, which has peft's task type SEQ_CLS; the
    directory of such an adapter continues it. `train` also sets the padding token (see `set_pad_token`; `ids_that_end` are further
    tokens that end a sequence); without, the model is frozen and must have a score layer. `key` is for errors.

    Raises ConfigError for what is missing, incomplete or no reward model.
    """
    source = Source(config, "SEQ_CLS", key)
    if not (train or source.has_score or source.adapter):
        raise ConfigError(
            f"{config.model_name_or_path} is no reward model: it has no score layer ({source.config.model_type!r}, "
            f"{source.config.architectures}). Give a sequence classifier with one label; `llmrl reward` trains one from a language model"
        )
    tokenizer = source.tokenizer()
    model = source.model()
    check_vocabulary(model, tokenizer)
    if train:
        _prepare(source, model, tokenizer, ids_that_end)
    elif tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model = _adapted(source, model)
    if not train:
        return model.to(device).eval().requires_grad_(False), tokenizer
    return for_training(config, model).to(device), tokenizer


def load_scorer_skeleton(config: ModelFields, *, ids_that_end: Iterable[int] = ()) -> tuple[Any, Any]:
    """As `load_scorer` to train, but the weights are on the "meta" device."""
    source = Source(config, "SEQ_CLS")
    tokenizer = source.tokenizer()
    with torch.device("meta"):
        model = source.skeleton()
        check_vocabulary(model, tokenizer)
        _prepare(source, model, tokenizer, ids_that_end)
        return for_training(config, source.adapted(model, weights=False)), tokenizer


def load_frozen_scorer(name: str, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """A saved reward model, to score with: in bfloat16 where its configuration says so, else in float32."""
    key = "rewards: model"
    dtype = Source(ModelFields(model_name_or_path=name), "SEQ_CLS", key).config.dtype
    fields = ModelFields(model_name_or_path=name, dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
    return load_scorer(fields, device, train=False, key=key)


def load_critic(config: PPOConfig, device: torch.device | str | None = None, *, tokenizer: Any = None) -> Any:
    """The model of `critic: separate`, in training mode: `critic_model_name_or_path`, else what the policy starts from.

    A reward model brings its score layer; a new one is 0, so that a critic begins as "no baseline". `lora` gives it adapters of its
    own. Raises ConfigError where its vocabulary is not that of the policy's `tokenizer` (default: the recipe's).
    """
    source = Source(_critic_fields(config), "SEQ_CLS", "critic_model_name_or_path")
    model = source.model()
    _check_same_vocabulary(source, model, tokenizer or Source(config).tokenizer())
    if not source.has_score:
        for parameter in _score_layer(model).parameters():
            nn.init.zeros_(parameter)
    return for_training(config, _adapted(source, model)).to(device)


def load_critic_skeleton(config: PPOConfig) -> Any:
    """As `load_critic`, but the weights are on the "meta" device."""
    source = Source(_critic_fields(config), "SEQ_CLS", "critic_model_name_or_path")
    with torch.device("meta"):
        model = source.skeleton()
        _check_same_vocabulary(source, model, Source(config).tokenizer())
        return for_training(config, source.adapted(model, weights=False))


def set_pad_token(model: Any, tokenizer: Any, ids_that_end: Iterable[int] = (), *, may_grow: bool = True) -> None:
    """Gives model and tokenizer a padding token that ends no sequence: transformers scores the last token that is not padding.

    The first of these that is neither BOS, EOS nor a token that ends a sequence: the tokenizer's own; an added token whose name has
    "pad" in it, then "reserved", then "unused", and which the chat template does not write; else a new `<|pad|>`. That takes a spare
    row of the embeddings, or adds a row (`may_grow`). Raises ConfigError where there is none and it may not.
    """
    embeddings = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    taken = {*ids_that_end, *stop_token_ids(model, tokenizer), tokenizer.bos_token_id}
    found = tokenizer.pad_token if tokenizer.pad_token_id not in (None, *taken) else None
    found = found or _unused_token(tokenizer, taken, rows)
    if found is None and len(tokenizer) >= rows and not may_grow:
        raise ConfigError(
            f"{tokenizer.name_or_path} has no token for padding other than those that end a text, and the embeddings have no row to "
            "spare; an adapter can't add one. Add a padding token to the base model and enlarge its embeddings, or train without `lora`"
        )
    if found is None:
        vocabulary = tokenizer.get_vocab()
        found = next(name for name in map(_NEW_PAD.format, ("", *range(len(vocabulary) + 1))) if name not in vocabulary)
        logger.info("the tokenizer has no token for padding that ends no text: added %s", found)
    if found != tokenizer.pad_token:
        tokenizer.add_special_tokens({"pad_token": found})
    pad = tokenizer.pad_token_id
    if pad >= rows:
        logger.info("the embeddings grow from %d to %d rows, for %s", rows, pad + 1, found)
        with torch.random.fork_rng(devices=()):
            model.resize_token_embeddings(pad + 1, mean_resizing=False)
    model.config.pad_token_id = pad
    model.get_input_embeddings().padding_idx = (
        pad  # its gradient is not computed: EOS, once padding, must get one again
    )


def _critic_fields(config: PPOConfig) -> ModelFields:
    if config.critic_model_name_or_path is None:
        return config
    own = {"model_name_or_path": config.critic_model_name_or_path, "model_revision": "main"}
    return config.model_copy(update={**own, "tokenizer_name_or_path": None, "chat_template": None})


def _unused_token(tokenizer: Any, taken: set[Any], rows: int) -> str | None:
    template = str(tokenizer.chat_template or "")
    added = {i: token.content for i, token in sorted(tokenizer.added_tokens_decoder.items())}
    free = [text for i, text in added.items() if i not in taken and i < rows and text not in template]
    return next((text for word in _UNUSED for text in free if word in text.lower()), None)


def _prepare(source: Source, model: Any, tokenizer: Any, ids_that_end: Iterable[int]) -> None:
    """A new score layer, and the padding token. transformers gives classifiers no generation config, which lists stop tokens."""
    if not source.has_score:
        _init_score(_score_layer(model), getattr(source.fields, "seed", 0))
    named = SimpleNamespace(generation_config=source.generation_config())
    ends = {*ids_that_end, *stop_token_ids(named, tokenizer)}
    set_pad_token(model, tokenizer, ends, may_grow=source.adapter is None and source.fields.lora is None)


def _score_layer(model: Any) -> nn.Module:
    if not hasattr(model, "score"):
        raise ConfigError(f"{type(model).__name__} has no `score` layer; give a model of another family")
    return model.score  # type: ignore[no-any-return]


def _init_score(layer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()  # a bias, where there is one
        if not layer.weight.is_meta:
            draw = torch.randn(layer.weight.shape, generator=generator, device="cpu")
            layer.weight.copy_(draw / (layer.weight.shape[1] + 1) ** 0.5)


def _adapted(source: Source, model: Any) -> Any:
    adapted = source.adapted(model)
    if source.adapter is not None and not source.has_score:
        from peft import load_peft_weights

        names = load_peft_weights(source.adapter, device="cpu", revision=source.fields.model_revision)
        if not any(".score." in name for name in names):
            raise ConfigError(
                f"{source.adapter} has no score layer, and its base {source.base} neither: it is no whole reward model"
            )
    return adapted


def _check_same_vocabulary(source: Source, model: Any, tokenizer: Any) -> None:
    """The critic reads the policy's token ids."""
    rows, name = model.get_input_embeddings().weight.shape[0], source.fields.model_name_or_path
    if len(tokenizer) > rows:
        raise ConfigError(
            f"critic_model_name_or_path: {name} has embeddings for {rows} tokens, the policy's tokenizer has {len(tokenizer)}; a critic "
            "reads the policy's tokens: give a model with the same tokenizer"
        )
    try:
        own = {i: text for text, i in source.tokenizer().get_vocab().items()}
    except ConfigError:  # a critic's directory needs none
        return
    theirs = ((text, i) for text, i in tokenizer.get_vocab().items())
    other = next(((text, i, own[i]) for text, i in theirs if own.get(i, text) != text), None)
    if other is not None:
        raise ConfigError(
            f"critic_model_name_or_path: {name} has another vocabulary than the policy: token {other[1]} is {other[2]!r} there and "
            f"{other[0]!r} in the policy's tokenizer; give a model with the same tokenizer"
        )
