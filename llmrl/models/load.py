"""Models and tokenizers from disk or hub, adapters, references, and the way back to disk in Hugging Face's layout."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar
from transformers.utils.peft_utils import find_adapter_config_file

from llmrl.config.model import LoraSettings, ModelFields
from llmrl.errors import ConfigError
from llmrl.models.packing import packing_support

if not sys.stderr.isatty():  # a bar of transformers' is a line a step in a log file
    disable_progress_bar()

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PROBE = "The answer's 3.14159 = 12345/6789;\n\n  so\tNaïve Zoë wrote: “日本語”, don't!\n"
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
)  # what transformers raises for what it can't load


def load_policy(config: ModelFields, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """(model in training mode, tokenizer) that a recipe names, with its adapter and gradient checkpointing.

    A directory or hub id with a LoRA adapter continues that adapter on its base model. Raises ConfigError, before weights are
    read where possible, for what is missing, incomplete or can't be trained.
    """
    source = _Source(config)
    tokenizer = source.tokenizer()
    model = source.model()
    _check_vocabulary(model, tokenizer)
    model = source.adapted(model)
    if config.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"gradient_checkpointing: {error}") from error
    return model.to(device).train(), tokenizer


def load_skeleton(config: ModelFields) -> tuple[Any, Any]:
    """As `load_policy`, but the weights are on the "meta" device: shapes and settings in no time and no memory."""
    source = _Source(config)
    tokenizer = source.tokenizer()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            source.config, dtype=_DTYPES[config.dtype], trust_remote_code=config.trust_remote_code
        )
        model.tie_weights()
        model.generation_config = source.generation_config() or model.generation_config
        _check_vocabulary(model, tokenizer)
        return source.adapted(model, weights=False), tokenizer


def load_reference(config: ModelFields, policy: nn.Module) -> Any:
    """What the policy is now, as a frozen copy; None with an adapter, since switching it off gives the reference."""
    if is_adapted(policy):
        return None
    return copy.deepcopy(policy).eval().requires_grad_(False)


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


def load_weights(model: Any, directory: str | Path) -> None:
    """Loads what `save_model` wrote into a model of the same shape, in place. Raises ConfigError where tensors don't fit."""
    if is_adapted(model):
        from peft import load_peft_weights, set_peft_model_state_dict

        result = set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"))
        lost = [n for n in result.missing_keys if "lora_" in n or "modules_to_save" in n] + list(result.unexpected_keys)
        if lost:
            raise ConfigError(f"{directory}: the adapter does not fit this model; {len(lost)} tensors, {lost[0]} first")
        return
    loaded = _from_pretrained(type(model), str(directory), dtype=model.dtype, config=model.config)
    model.load_state_dict(loaded.state_dict())


def merge_lora(adapter_dir: str | Path, out_dir: str | Path) -> None:
    """Adds a saved adapter to its base model, in float32, and saves a plain model of the base's type, with the tokenizer."""
    config = ModelFields(model_name_or_path=str(adapter_dir))
    source = _Source(config)
    if source.adapter is None:
        raise ConfigError(f"{adapter_dir} has no adapter_config.json: there is nothing to merge")
    model = source.adapted(source.model())
    merged = model.merge_and_unload(safe_merge=True)
    save_model(merged.to(source.config.dtype or torch.float32), source.tokenizer(), out_dir)


@torch.no_grad()
def full_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in the plain model, whole tensor) of every parameter, adapters merged in, one layer at a time; tied ones once."""
    base = model.get_base_model() if is_adapted(model) else model
    seen: set[int] = set()
    inside: str | None = None  # of a layer that has been given as a whole
    for path, module in base.named_modules():
        if inside is not None and path.startswith(inside):
            continue
        inside = None
        if hasattr(module, "get_delta_weight") or hasattr(module, "modules_to_save"):
            inside = f"{path}."
        plain = _merged(module) if inside else module
        for name, parameter in plain.named_parameters(recurse=inside is not None):
            if id(parameter) not in seen:
                if inside is None:
                    seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter.detach()


def _merged(layer: Any) -> nn.Module:
    """The plain layer that a peft layer stands for."""
    if hasattr(layer, "modules_to_save"):
        return layer.modules_to_save[layer.active_adapters[0]]
    layer = copy.deepcopy(layer)
    layer.merge()
    return layer.get_base_layer()


class _Source:
    """Where a recipe's model, tokenizer and adapter come from, checked before any weight is read."""

    def __init__(self, fields: ModelFields) -> None:
        self.fields = fields
        name = fields.model_name_or_path
        _check_directory(name, "model_name_or_path", ("config.json", "adapter_config.json"))
        self.hub: dict[str, Any] = {"revision": fields.model_revision, "trust_remote_code": fields.trust_remote_code}
        self.adapter: str | None = None
        self.base = name
        found = find_adapter_config_file(name, revision=fields.model_revision)
        if found is not None:
            self.adapter, self.base = name, json.loads(Path(found).read_text())["base_model_name_or_path"]
            _check_directory(self.base, f"the base model of the adapter {name}", ("config.json",))
            self.hub["revision"] = "main"
        try:
            self.config = AutoConfig.from_pretrained(self.base, **self.hub)
        except _LOADING_ERRORS as error:
            raise ConfigError(_unavailable("model_name_or_path", self.base, error)) from error
        packing_support(self.config)

    def generation_config(self) -> GenerationConfig | None:
        try:
            return GenerationConfig.from_pretrained(self.base, revision=self.hub["revision"])
        except OSError:  # the file is optional
            return None

    def tokenizer(self) -> Any:
        fields = self.fields
        name = fields.tokenizer_name_or_path
        if name is None:
            own = self.adapter is not None and (Path(self.adapter) / "tokenizer_config.json").is_file()
            name = str(self.adapter) if own else self.base
        else:
            _check_directory(
                name, "tokenizer_name_or_path", ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
            )
        revision = self.hub["revision"] if name == self.base else "main"
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=fields.trust_remote_code
            )
        except _LOADING_ERRORS as error:
            what = "tokenizer_name_or_path (by default the model's own)"
            raise ConfigError(_unavailable(what, name, error)) from error
        if len(tokenizer) <= len(
            tokenizer.added_tokens_decoder
        ):  # what transformers makes up where the files are missing
            raise ConfigError(f"tokenizer_name_or_path: {name} has no tokenizer; give the directory or hub id of one")
        _check_splitting(name, revision, tokenizer)
        if fields.chat_template is not None:
            tokenizer.chat_template = _chat_template(fields.chat_template)
        return tokenizer

    def model(self) -> Any:
        return _from_pretrained(AutoModelForCausalLM, self.base, dtype=_DTYPES[self.fields.dtype], **self.hub)

    def adapted(self, model: Any, weights: bool = True) -> Any:
        """The model with the adapter that was found, or with the new one that the recipe asks for; unchanged without."""
        lora = self.fields.lora
        if self.adapter is not None:
            return _continue_adapter(model, self.adapter, lora, self.fields.model_revision, weights)
        return model if lora is None else _new_adapter(model, lora, getattr(self.fields, "seed", 0))


def _new_adapter(model: Any, lora: LoraSettings, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    name = model.config._name_or_path
    if Path(name).is_dir():  # the adapter must find its base from any working directory
        model.config._name_or_path = str(Path(name).resolve())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora.model_dump()))
        except ValueError as error:
            raise ConfigError(f"lora: {error}") from error


def _continue_adapter(model: Any, adapter: str, lora: LoraSettings | None, revision: str, weights: bool) -> Any:
    from peft import PeftConfig, PeftModel, get_peft_model

    saved = PeftConfig.from_pretrained(adapter, revision=revision)
    if lora is not None and (lora.r, lora.lora_alpha) != (
        getattr(saved, "r", None),
        getattr(saved, "lora_alpha", None),
    ):
        raise ConfigError(
            f"{adapter} is an adapter with r={getattr(saved, 'r', None)}, lora_alpha={getattr(saved, 'lora_alpha', None)}, the recipe "
            f"asks for r={lora.r}, lora_alpha={lora.lora_alpha}. Leave `lora` out to continue it, or merge it first."
        )
    if not weights:
        return get_peft_model(model, saved)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True, revision=revision)


def _from_pretrained(model_class: Any, name: str, **kwargs: Any) -> Any:
    """A whole model: transformers would fill tensors that a checkpoint lacks with random numbers."""
    try:
        model, report = model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    except _LOADING_ERRORS as error:
        raise ConfigError(_unavailable("model_name_or_path", name, error)) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(
            f"{name} lacks {len(missing)} of the model's tensors, {missing[0]} first: it is not a whole causal language model"
        )
    return model


def _check_splitting(name: str, revision: str, tokenizer: Any) -> None:
    """Warns where transformers rebuilt the tokenizer in a way that splits text differently from the file that was saved.

    It does so for some model types (Qwen2 among them) whose files came with a tokenizer of another kind.
    """
    file = cached_file(name, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return
    saved = Tokenizer.from_file(file).encode(_PROBE, add_special_tokens=False).ids
    if saved != tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
        warnings.warn(
            f"transformers reads the tokenizer of {name} as a {type(tokenizer).__name__}, which splits text differently from its "
            "tokenizer.json. If the model was trained on the latter, save the tokenizer anew in a directory without a config.json "
            "and give that as tokenizer_name_or_path.",
            stacklevel=2,
        )


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}: they don't belong together. "
            "Give the model's own tokenizer, or a model whose embeddings were enlarged."
        )


def _check_directory(name: str, what: str, files: tuple[str, ...]) -> None:
    """A directory must hold one of the files; what looks like a path must be there. Other names are hub ids."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / f).is_file() for f in files):
            raise ConfigError(
                f"{what}: {name} is a directory without {' or '.join(files)}; give the directory of a saved model"
            )
    elif path.is_file() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"{what}: there is no directory {name}; give the directory of a saved model, or a hub id like org/name"
        )


def _unavailable(what: str, name: str, error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return (
        f"{what}: {name} can't be loaded ({type(error).__name__}: {first}). Give a directory in Hugging Face's format, or a hub id "
        "that is reachable or in the local cache; code that comes with a model runs only with trust_remote_code: true."
    )


def _chat_template(value: str) -> str:
    if "{%" in value or "{{" in value:
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat_template: {value!r} is neither a Jinja template (it has no {{{{ or {{%) nor a file")
    return path.read_text(encoding="utf-8")
