"""The parts of the benchmarks that can go wrong without anybody looking."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_made_up_text_has_the_lengths_of_the_real_one():
    import assets

    rows, prompts, pairs = assets._made_up_text()
    tokenizer = assets._train_tokenizer([row["prompt"] + row["completion"] for row in rows])
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows]
    completions = sum(len(tokenizer(row["completion"])["input_ids"]) for row in rows)
    assert 110 < sum(lengths) / len(lengths) < 180  # the frozen rows: 144
    assert 0.4 < completions / sum(lengths) < 0.55  # 0.47
    assert len(prompts) == 64
    # the frozen pairs: about 345 tokens both sides together, 71% of them prompt
    sizes = [[len(tokenizer(pair[k])["input_ids"]) for k in ("prompt", "chosen", "rejected")] for pair in pairs]
    prompt, answers = 2 * sum(s[0] for s in sizes), sum(s[1] + s[2] for s in sizes)
    assert 280 < (prompt + answers) / len(pairs) < 410
    assert 0.6 < prompt / (prompt + answers) < 0.8


def test_useful_operations_are_six_a_weight_and_token():
    import tasks
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=100, **sizes))
    matrices = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.dim() == 2)
    flops = tasks.sft_flops(hidden=32, layers=3, intermediate=48, kv=16, vocabulary=100, tokens=10, loss_tokens=4)
    assert flops == 6 * (matrices * 10 + 32 * 100 * 4)
