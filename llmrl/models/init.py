"""A small language model from scratch, with a tokenizer trained on given text: everything can be tried without a hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, Qwen2Tokenizer

from llmrl.errors import ConfigError, DataError

Family = Literal["qwen2", "qwen3", "llama", "mistral", "gemma2"]

END_OF_TEXT, TURN, END_OF_TURN = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = """\
{% if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] or '' }}\
{% for call in message['tool_calls'] or [] %}<tool_call>{{ (call['function'] or call) | tojson }}</tool_call>{% endfor %}\
<|im_end|>{% endgeneration %}\
{% else %}{{ message['content'] }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML with tools and tool calls as JSON, and the assistant's part marked for the loss. A newline after a block is dropped, as transformers renders templates."""


def init_model(
    out_dir: str | Path,
    *,
    train_files: Sequence[str | Path] = (),
    texts: Iterable[str] = (),
    fields: Sequence[str] | None = None,
    family: Family = "qwen2",
    vocab_size: int = 4096,
    hidden_size: int = 256,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 2048,
    initializer_range: float = 0.02,
    tie_word_embeddings: bool = True,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Trains a byte-level BPE tokenizer on the text, makes a random model of its vocabulary, saves both and returns the directory.

    train_files: .jsonl (the strings of every row, or of the `fields` named, wherever they are nested) or plain text; texts: strings
    beside them. vocab_size is an upper bound: little text has few pairs to merge. Every digit is a token of its own.
    intermediate_size defaults to 8/3 hidden_size, in multiples of 32; num_kv_heads to num_heads. float32. Prints the parameter count.
    Raises ConfigError for sizes that don't fit each other, DataError for files without text.

    Example: init_model("runs/init", train_files=["rows.jsonl"], vocab_size=512, hidden_size=128, num_layers=2)
    """
    out = Path(out_dir)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"{out} is not empty; give a new directory, or overwrite it on purpose")
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    _check_sizes(family, vocab_size, hidden_size, num_heads, kv_heads, num_layers)
    tokenizer = train_tokenizer(_strings(train_files, fields, texts), vocab_size, max_position_embeddings)
    stops = [tokenizer.convert_tokens_to_ids(t) for t in (END_OF_TURN, END_OF_TEXT)]
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size or -(-8 * hidden_size // (3 * 32)) * 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": initializer_range,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": stops[0],
        "pad_token_id": tokenizer.pad_token_id,
        **_family_settings(family, hidden_size // num_heads),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {family}, {model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    return out


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """Qwen2's byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909), digits kept apart, with pairs learned from the texts.

    The end of a turn is the eos; the end of text, which pads, stops a completion as well. Raises DataError where there is no text.
    """
    counted = _Counted(texts)
    # Not a class of its own: transformers reads a tokenizer next to a Qwen2 model as Qwen2's, whatever was saved there.
    empty = Qwen2Tokenizer(
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
    )
    tokenizer = empty.train_new_from_iterator(counted, vocab_size, show_progress=False)
    if not counted.characters:
        raise DataError(
            "There is no text to train a tokenizer on: the files have no strings, or not in the fields named"
        )
    return tokenizer


class _Counted:
    """Passes strings on and counts their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.characters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            yield text


def _check_sizes(family: str, vocab: int, hidden: int, heads: int, kv_heads: int, layers: int) -> None:
    if family not in get_args(Family):
        raise ConfigError(f"family is {family!r}; there are {', '.join(get_args(Family))}")
    if min(hidden, heads, kv_heads, layers) < 1:
        raise ConfigError("hidden_size, num_heads, num_kv_heads and num_layers must be at least 1")
    if hidden % (2 * heads) or heads % kv_heads:
        raise ConfigError(
            f"hidden_size {hidden} must be a multiple of twice num_heads {heads} (rotary embeddings turn pairs), and num_heads a "
            f"multiple of num_kv_heads {kv_heads}"
        )
    least = 256 + len(SPECIAL_TOKENS)
    if vocab < least:
        raise ConfigError(f"vocab_size is {vocab}; every byte and {len(SPECIAL_TOKENS)} special tokens need {least}")


def _family_settings(family: str, head_dim: int) -> dict[str, Any]:
    """What a family's own defaults would get wrong for a small model."""
    settings: dict[str, dict[str, Any]] = {
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"head_dim": head_dim, "use_sliding_window": False},
        "llama": {},
        "mistral": {"head_dim": head_dim, "sliding_window": None},
        "gemma2": {"head_dim": head_dim, "query_pre_attn_scalar": head_dim},
    }
    return settings[family]


def _strings(files: Sequence[str | Path], fields: Sequence[str] | None, texts: Iterable[str]) -> Iterator[str]:
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise DataError(f"{path}: there is no such file; give .jsonl or plain text to train the tokenizer on")
        with path.open(encoding="utf-8") as lines:
            if path.suffix != ".jsonl":
                yield from lines
                continue
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}: this line is not JSON ({error})") from error
                if isinstance(row, dict) and fields is not None:
                    row = [row[f] for f in fields if f in row]
                yield from _nested(row)
    yield from texts


def _nested(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _nested(item)
