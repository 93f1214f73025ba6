"""Where a recipe's model, tokenizer and adapter come from: a directory or a hub id, checked before any weight is read."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar
from transformers.utils.peft_utils import find_adapter_config_file

from llmrl.config.model import LoraSettings, ModelFields
from llmrl.errors import ConfigError
from llmrl.models.packing import packing_support
from llmrl.models.quantize import DTYPES, quantization_config, settle

if not sys.stderr.isatty():  # a bar of transformers' is a line a step in a log file
    disable_progress_bar()

Task = Literal["CAUSAL_LM", "SEQ_CLS"]
_PROBE = "The answer's 3.14159 = 12345/6789;\n\n  so\tNaïve Zoë wrote: “日本語”, don't!\n"
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
)  # what transformers raises for what it can't load


class Source:
    """Where a recipe's model, tokenizer and adapter come from, checked before any weight is read.

    task: peft's name of what the model is for, "CAUSAL_LM" or "SEQ_CLS" (one score a sequence); None: what the adapter says. `key`
    is what the recipe calls the model, for errors.
    """

    def __init__(self, fields: ModelFields, task: Task | None = "CAUSAL_LM", key: str = "model_name_or_path") -> None:
        self.fields, self.key = fields, key
        name = fields.model_name_or_path
        _check_directory(name, key, ("config.json", "adapter_config.json"))
        self.hub: dict[str, Any] = {"revision": fields.model_revision, "trust_remote_code": fields.trust_remote_code}
        self.adapter: str | None = None
        self.base = name
        found = find_adapter_config_file(name, revision=fields.model_revision)
        if found is not None:
            saved = json.loads(Path(found).read_text())
            self.adapter, self.base = name, saved["base_model_name_or_path"]
            task = task or saved.get("task_type")
            _check_task(name, saved.get("task_type"), task)
            _check_directory(self.base, f"the base model of the adapter {name}", ("config.json",))
            self.hub["revision"] = saved.get("revision") or "main"
        try:
            self.config = AutoConfig.from_pretrained(self.base, **self.hub)
        except _LOADING_ERRORS as error:
            raise ConfigError(_unavailable(key, self.base, error)) from error
        self.task: Task = task or "CAUSAL_LM"
        packing_support(self.config)
        self.quantization = quantization_config(fields, adapted=self.adapter is not None or fields.lora is not None)
        # A saved reward model has its head; to a language model one is added.
        self.has_score = any("SequenceClassification" in name for name in self.config.architectures or ())
        if self.task == "SEQ_CLS":
            self._make_scorer_config()
        elif task is not None and self.has_score:
            # With tied embeddings it would load, without a word about the score layer.
            raise ConfigError(
                f"{self.base} is a reward model, not a language model; give the model that it was trained from"
            )

    def _make_scorer_config(self) -> None:
        config = self.config
        remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not remote:
            raise ConfigError(
                f"transformers has no sequence classifier for {config.model_type!r}, so {self.base} can't be or become a reward model; "
                "give a model of another family"
            )
        if self.has_score and config.num_labels != 1:
            raise ConfigError(
                f"{self.base} classifies into {config.num_labels} labels; a reward model gives one score (num_labels 1). Give another "
                "reward model, or a causal language model to start one from"
            )
        if not self.has_score:
            config.id2label, config.label2id = {0: "reward"}, {"reward": 0}

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
        """The model without an adapter. The score layer of a new reward model is whatever transformers filled it with."""
        kwargs: dict[str, Any] = {"dtype": DTYPES[self.fields.dtype], **self.hub}
        if self.quantization is not None:
            kwargs["quantization_config"] = self.quantization
        if self.task == "CAUSAL_LM":
            return settle(from_pretrained(AutoModelForCausalLM, self.base, key=self.key, **kwargs), self.fields)
        new = () if self.has_score else ("score.",)
        with torch.random.fork_rng(devices=()):
            model = from_pretrained(
                AutoModelForSequenceClassification,
                self.base,
                new=new,
                key=self.key,
                config=self.config,
                **kwargs,
            )
        return settle(model, self.fields)

    def skeleton(self) -> Any:
        """The same on the device of the context, nothing read."""
        auto = AutoModelForCausalLM if self.task == "CAUSAL_LM" else AutoModelForSequenceClassification
        return auto.from_config(
            self.config, dtype=DTYPES[self.fields.dtype], trust_remote_code=self.fields.trust_remote_code
        )

    def adapted(self, model: Any, weights: bool = True) -> Any:
        """The model with the adapter that was found, or with the new one that the recipe asks for; unchanged without."""
        lora = self.fields.lora
        if self.adapter is not None:
            return _continue_adapter(model, self.adapter, lora, self.fields.model_revision, weights)
        if lora is None:
            return model
        seed, revision = getattr(self.fields, "seed", 0), self.fields.model_revision
        return new_adapter(model, lora, seed, self.task, revision=None if revision == "main" else revision)


def new_adapter(
    model: Any, lora: LoraSettings, seed: int, task: Task = "CAUSAL_LM", *, revision: str | None = None
) -> Any:
    """A new adapter around the model; for "SEQ_CLS" peft trains and saves the score layer beside it.

    `revision` is the base's on the hub, which the adapter remembers.
    """
    from peft import LoraConfig, get_peft_model

    name = model.config._name_or_path
    if Path(name).is_dir():  # the adapter must find its base from any working directory
        model.config._name_or_path = str(Path(name).resolve())
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, LoraConfig(task_type=task, **lora.model_dump()), revision=revision)
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


def from_pretrained(
    model_class: Any, name: str, *, new: tuple[str, ...] = (), key: str = "model_name_or_path", **kwargs: Any
) -> Any:
    """A whole model: transformers would fill tensors that a checkpoint lacks with random numbers.

    Only those whose names begin with one of `new` may be missing.
    """
    reports = logging.getLogger("transformers.modeling_utils")
    if new:
        reports.addFilter(_no_report)
    try:
        model, report = model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    except _LOADING_ERRORS as error:
        raise ConfigError(_unavailable(key, name, error)) from error
    finally:
        reports.removeFilter(_no_report)
    missing = sorted(key for key in report["missing_keys"] if not (new and key.startswith(new)))
    if missing:
        raise ConfigError(
            f"{name} lacks {len(missing)} of the model's tensors, {missing[0]} first: it is not a whole {type(model).__name__}"
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


def _no_report(record: logging.LogRecord) -> bool:
    """Keeps transformers from reporting as missing what is meant to be new; what is not meant to be is raised."""
    return "LOAD REPORT" not in record.getMessage()


def _check_task(adapter: str, saved: str | None, task: str | None) -> None:
    """An adapter of another kind would load without its output layer."""
    if saved == task or (saved is None and task == "CAUSAL_LM"):
        return
    kinds = {"CAUSAL_LM": "a language model", "SEQ_CLS": "a reward model"}
    raise ConfigError(
        f"{adapter} is an adapter of {kinds.get(str(saved), str(saved))} (task_type {saved}), not of {kinds.get(str(task), str(task))}. Merge "
        "it first (llmrl merge), or give another"
    )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
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
