"""Models and tokenizers from scratch."""

import json
from typing import get_args

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl.config.model import ModelFields
from llmrl.errors import ConfigError, DataError
from llmrl.models.forward import PolicyModule
from llmrl.models.init import Family, init_model
from llmrl.models.load import load_policy, stop_token_ids

TEXT = ["the answer is twelve", "three times four is twelve", "an answer, 12 345"] * 5
SMALL = {"texts": TEXT, "vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}


@pytest.mark.parametrize("family", get_args(Family))
def test_every_family_loads_and_packs(tmp_path, family, capsys):
    out = init_model(tmp_path / "m", family=family, **SMALL)
    model, tokenizer = load_policy(ModelFields(model_name_or_path=str(out)))
    assert PolicyModule(model).packing == "packed" and model.config.model_type == family
    assert len(tokenizer) == model.config.vocab_size <= 300
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in capsys.readouterr().out
    assert stop_token_ids(model, tokenizer) == (0, 1)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    saved = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in (*TEXT, "  Zwölf\n\n 日本 don't 12<|im_end|>"):
        assert tokenizer(text)["input_ids"] == saved.encode(text).ids, "every reader must split text alike"


def test_the_same_seed_gives_the_same_model(tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    paths = [init_model(tmp_path / str(i), seed=seed, **SMALL) for i, seed in enumerate((3, 3, 4))]
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in paths)
    assert all(torch.equal(a[n], b[n]) for n in a) and any(not torch.equal(a[n], c[n]) for n in a)
    files = [p / "tokenizer.json" for p in paths]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_template_marks_what_the_assistant_says(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(init_model(tmp_path / "m", **SMALL))
    turns = [("system", "be brief"), ("user", "3*4?"), ("assistant", "12\n"), ("user", "?"), ("assistant", "twelve")]
    messages = [{"role": role, "content": text} for role, text in turns]
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    kept = [i for i, m in zip(out["input_ids"], out["assistant_masks"]) if m]
    assert tokenizer.decode(kept) == "12\n<|im_end|>twelve<|im_end|>"
    assert tokenizer.decode(out["input_ids"]) == "".join(f"<|im_start|>{r}\n{t}<|im_end|>\n" for r, t in turns)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages[:3], tokenize=False).startswith(prompt)


def test_the_template_writes_tools_and_tool_calls(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(init_model(tmp_path / "m", **SMALL))
    call = {"type": "function", "function": {"name": "times", "arguments": {"a": 3}}}
    messages = [{"role": "user", "content": "3*4?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "12"}, {"role": "assistant", "content": "twelve"}]  # fmt: skip
    tools = [{"name": "times"}]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    written = '<tool_call>{"name": "times", "arguments": {"a": 3}}</tool_call>'
    assert text == (
        '<|im_start|>tools\n[{"name": "times"}]<|im_end|>\n<|im_start|>user\n3*4?<|im_end|>\n'
        f"<|im_start|>assistant\n{written}<|im_end|>\n<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\ntwelve<|im_end|>\n"
    )
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    kept = [i for i, m in zip(out["input_ids"], out["assistant_masks"]) if m]
    assert tokenizer.decode(kept) == f"{written}<|im_end|>twelve<|im_end|>"


def test_any_text_survives_and_digits_stay_apart(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(init_model(tmp_path / "m", **SMALL))
    for text in ("  Zwölf  Äpfel\n\n\t日本 🙂", "a <|im_start|> b", "12345"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    assert len(tokenizer("answer")["input_ids"]) < 6, "the text given must have been learned from"


def test_files(tmp_path):
    rows = [{"q": "alpha alpha", "messages": [{"role": "user", "content": "gammagamma"}]}, {"a": "beta", "n": 3}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "x.txt").write_text("deltadelta\n" * 9)
    settings = {**SMALL, "texts": (), "vocab_size": 280}
    out = init_model(tmp_path / "m", train_files=[tmp_path / "x.jsonl", tmp_path / "x.txt"], **settings)
    assert len(AutoTokenizer.from_pretrained(out)("deltadelta")["input_ids"]) < 5
    only = init_model(tmp_path / "n", train_files=[tmp_path / "x.jsonl"], fields=["messages"], **settings)
    tokenizer = AutoTokenizer.from_pretrained(only)
    assert len(tokenizer("gammagamma")["input_ids"]) < len(tokenizer("alpha beta")["input_ids"]) - 2
    with pytest.raises(DataError, match="no text"):
        init_model(tmp_path / "o", train_files=[tmp_path / "x.jsonl"], fields=["nothing"], **settings)
    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\n{oops\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: this line is not JSON"):
        init_model(tmp_path / "o", train_files=[tmp_path / "bad.jsonl"], **settings)
    with pytest.raises(DataError, match="there is no such file"):
        init_model(tmp_path / "o", train_files=[tmp_path / "absent.txt"], **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 36}, "multiple of twice num_heads 4"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads 3"),
        ({"vocab_size": 100}, "need 259"),
        ({"num_layers": 0}, "at least 1"),
        ({"family": "bert"}, "family is 'bert'; there are qwen2, qwen3"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        init_model(tmp_path / "m", **{**SMALL, **change})
    assert not (tmp_path / "m").exists()


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        init_model(tmp_path, **SMALL)
    init_model(tmp_path, overwrite=True, **SMALL)
    assert (tmp_path / "notes.txt").read_text() == "mine"
