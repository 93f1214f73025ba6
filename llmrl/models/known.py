"""Models by name, so that a plan for them needs neither a hub nor a disk: the numbers of their published config.json."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from llmrl.config.model import ModelFields
from llmrl.errors import ConfigError
from llmrl.models.shape import ModelShape, shape_of
from llmrl.models.source import Source, Task, new_adapter


@dataclass(frozen=True)
class Known:
    """The sizes in a config.json; `hub` are the ids that it was read from, of one shape.

    sizes: hidden, intermediate, layers, heads, key-value heads, size of a head.
    """

    family: str
    sizes: tuple[int, int, int, int, int, int]
    vocab: int
    hub: tuple[str, ...]
    tied: bool = False
    experts: int = 0

    def config(self) -> Any:
        """transformers' configuration of this shape."""
        hidden, intermediate, layers, heads, kv_heads, head_dim = self.sizes
        experts = {"num_experts": self.experts} if self.experts else {}
        return AutoConfig.for_model(
            self.family,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            **experts,
        )


def _llama(*hub: str) -> tuple[str, ...]:
    return tuple(f"meta-llama/{name}{end}" for name in hub for end in ("", "-Instruct"))


def _qwen(name: str, end: str) -> tuple[str, ...]:
    return (f"Qwen/{name}", f"Qwen/{name}{end}")


def _qwen2(size: str, *, sizes: tuple[int, int, int, int, int, int], tied: bool = False) -> Known:
    return Known("qwen2", sizes, 151_936 if tied else 152_064, _qwen(f"Qwen2.5-{size}", "-Instruct"), tied)


def _qwen3(size: str, *, sizes: tuple[int, int, int, int, int, int], tied: bool = False) -> Known:
    return Known("qwen3", sizes, 151_936, _qwen(f"Qwen3-{size}", "-Base"), tied)


KNOWN = {
    "llama-1b": Known("llama", (2048, 8192, 16, 32, 8, 64), 128_256, _llama("Llama-3.2-1B"), tied=True),
    "llama-3b": Known("llama", (3072, 8192, 28, 24, 8, 128), 128_256, _llama("Llama-3.2-3B"), tied=True),
    "llama-8b": Known(
        "llama", (4096, 14336, 32, 32, 8, 128), 128_256, _llama("Llama-3.1-8B", "Meta-Llama-3.1-8B", "Meta-Llama-3-8B")
    ),
    "llama-70b": Known(
        "llama", (8192, 28672, 80, 64, 8, 128), 128_256, _llama("Llama-3.1-70B", "Llama-3.3-70B", "Meta-Llama-3-70B")
    ),
    "llama-405b": Known("llama", (16384, 53248, 126, 128, 8, 128), 128_256, _llama("Llama-3.1-405B")),
    "qwen2.5-0.5b": _qwen2("0.5B", sizes=(896, 4864, 24, 14, 2, 64), tied=True),
    "qwen2.5-1.5b": _qwen2("1.5B", sizes=(1536, 8960, 28, 12, 2, 128), tied=True),
    "qwen2.5-3b": _qwen2("3B", sizes=(2048, 11008, 36, 16, 2, 128), tied=True),
    "qwen2.5-7b": _qwen2("7B", sizes=(3584, 18944, 28, 28, 4, 128)),
    "qwen2.5-14b": _qwen2("14B", sizes=(5120, 13824, 48, 40, 8, 128)),
    "qwen2.5-32b": _qwen2("32B", sizes=(5120, 27648, 64, 40, 8, 128)),
    "qwen2.5-72b": _qwen2("72B", sizes=(8192, 29568, 80, 64, 8, 128)),
    "qwen3-0.6b": _qwen3("0.6B", sizes=(1024, 3072, 28, 16, 8, 128), tied=True),
    "qwen3-1.7b": _qwen3("1.7B", sizes=(2048, 6144, 28, 16, 8, 128), tied=True),
    "qwen3-4b": _qwen3("4B", sizes=(2560, 9728, 36, 32, 8, 128), tied=True),
    "qwen3-8b": _qwen3("8B", sizes=(4096, 12288, 36, 32, 8, 128)),
    "qwen3-14b": _qwen3("14B", sizes=(5120, 17408, 40, 40, 8, 128)),
    "qwen3-32b": _qwen3("32B", sizes=(5120, 25600, 64, 64, 8, 128)),
    "qwen3-30b-a3b": Known(
        "qwen3_moe", (2048, 6144, 48, 32, 4, 128), 151_936, _qwen("Qwen3-30B-A3B", "-Base"), experts=128
    ),
}
_OF_HUB = {name.lower(): known for known in KNOWN.values() for name in known.hub}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def named_shape(fields: ModelFields, task: Task = "CAUSAL_LM", key: str = "model_name_or_path") -> ModelShape:
    """The shape of a model by short name (`KNOWN`), hub id or directory, with the adapter that `fields.lora` asks for.

    Names and ids in the table need no network. task "SEQ_CLS": with a score instead of a head; `key` is what errors call the model.
    Raises ConfigError for a name that is nowhere, and for mixtures of experts.
    """
    name = fields.model_name_or_path
    known = KNOWN.get(name.lower()) or _OF_HUB.get(name.lower())
    if known is None and "/" not in name and not Path(name).is_dir():
        near = difflib.get_close_matches(name.lower(), KNOWN, n=3) or KNOWN
        raise ConfigError(
            f"{key}: no model {name!r}; give a directory, a hub id (org/name), or one of {', '.join(near)}"
        )
    source = None if known else Source(fields, task, key)
    config = known.config() if known else source.config  # type: ignore[union-attr]
    if any((getattr(config.get_text_config(), expert, None) or 0) > 1 for expert in _EXPERTS):
        raise ConfigError(
            f"{key}: {name} is a mixture of experts: a token uses a part of its weights, which experts a batch wakes up decides how many "
            "are read, and the formulas of this plan count every weight for every token. Plan for a dense model"
        )
    with torch.device("meta"):
        if source is not None:
            return shape_of(source.adapted(source.skeleton(), weights=False))
        config.num_labels = 1
        auto: Any = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
        model = auto.from_config(config)
        return shape_of(model if fields.lora is None else new_adapter(model, fields.lora, 0, task))
