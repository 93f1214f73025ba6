"""Small models and tokenizers from scratch, and the places of real data: no test needs a network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

pytest_plugins = ["tests.servers"]

ORACLES = Path(__file__).parent / "oracles"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL_SERVERS = {
    "test_engines.py", "test_judge_vllm.py", "test_vllm_engine.py", "test_vllm_runs.py", "test_vllm_server.py",
    "test_weight_sync_vllm.py",
}  # fmt: skip

CHATML = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shared_data(name: str) -> Path:
    """The path of a real data file, or a skip that says why."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"real data absent: {name}")
    return path


@pytest.hookimpl(optionalhook=True)  # pytest-xdist need not be there
def pytest_xdist_make_scheduler(config, log):
    """Shares whole files out, and those that ask the session's real servers as one, or each process would start its own."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "real servers" if Path(file).name in REAL_SERVERS else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 384 tokens with a ChatML template; <|im_end|> is the eos, <|pad|> the pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["the answer is 12 because three times four is twelve"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A 2-layer Qwen2 model of 384 tokens on disk, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=384, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, use_sliding_window=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tiny_model")
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path
