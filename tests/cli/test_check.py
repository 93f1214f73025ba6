"""`llmrl check` on small models and files, as a user runs it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from llmrl.cli.main import main
from tests.conftest import shared_data


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def data(tmp_path):
    def write(rows, name="d.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def _check(capsys, kind, model, path, *overrides):
    code = main(["check", kind, f"model_name_or_path={model}", "output_dir=o", f"dataset={path}", *overrides])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


CHAT = [
    {"messages": [{"role": "user", "content": "three times four"}, {"role": "assistant", "content": f"twelve {i}"}]}
    for i in range(6)
]
SUMS = [{"prompt": f"{i} plus 1 is", "answer": str(i + 1)} for i in range(10)]


def test_sft_shows_what_is_learned(capsys, data, tiny_model_dir):
    code, out, _ = _check(capsys, "sft", tiny_model_dir, data(CHAT), "batch_size=2", "max_steps=3")
    assert code == 0
    assert "⟦twelve 0<|im_end|>⟧" in out and "⟦three" not in out
    assert out.count("learned)") >= 3
    for text in (
        "6 kept, 0 dropped",
        "median",
        "p95",
        "A completion ends with: '<|im_end|>'",
        "a step",
        "2 rows",
        "steps",
        "updates",
    ):
        assert text in out
    for term in ("weights", "gradients", "optimizer", "activations", "head", "peak"):
        assert term in out
    assert "reference" not in out and "nothing found that would stop a run" in out


def test_colour_instead_of_brackets(capsys, data, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = _check(capsys, "sft", tiny_model_dir, data(CHAT))
    assert "⟦" not in out and "\x1b[1;32mtwelve 0<|im_end|>" in out


def test_grpo_tries_the_rewards(capsys, data, tiny_model_dir):
    path = data([*SUMS, {"prompt": "a bad one", "answer": ""}])
    code, out, _ = _check(
        capsys, "grpo", tiny_model_dir, path, "rewards=math_answer", "batch_size=4", "num_generations=2"
    )
    assert code == 0
    table = {
        line.rsplit(maxsplit=2)[0]: line.split()[-2:]
        for line in out.splitlines()
        if line.startswith(("the reference", "a wrong", "an empty"))
    }
    assert table == {
        "the reference, boxed": ["1.000", "1.000"],
        "the reference alone": ["1.000", "1.000"],
        "a wrong one": ["0.000", "0.000"],
        "an empty one": ["0.000", "0.000"],
    }
    assert "1 of 11 reference answers can't be verified" in out
    assert "4 prompts x 2 completions = 8 rollouts" in out
    assert "reference" in out and "key-value cache" in out


def test_a_reward_that_fails_is_a_problem(capsys, data, tiny_model_dir, tmp_path):
    (tmp_path / "bad.py").write_text("def boom(completions, **kw):\n    raise ValueError('no')\n")
    code, out, _ = _check(capsys, "grpo", tiny_model_dir, data(SUMS), f"rewards={tmp_path}/bad.py:boom")
    assert code == 1
    assert "problem: reward 'boom': 8 of 8 rows ended in 'error'" in out and "would stop a run" in out


def test_completions_that_do_not_fit_are_a_problem(capsys, data, tiny_model_dir):
    code, out, _ = _check(
        capsys, "grpo", tiny_model_dir, data(SUMS), "rewards=math_answer", "max_completion_length=512"
    )
    assert code == 1
    assert "10 prompts leave no room for max_completion_length 512 in the model's 512 positions" in out


def test_rewards_that_never_apply_are_a_problem(capsys, data, tiny_model_dir):
    path = data([{"prompt": "x", "note": "y"}])
    code, out, _ = _check(capsys, "grpo", tiny_model_dir, path, "rewards=math_answer")
    assert code == 1 and "no reward function gives any of these rows a reward" in out


def test_bad_rows_and_missing_models_end_with_one_message(capsys, data, tiny_model_dir):
    path = data([{"text": "fine"}, {"text": 5}])
    code, _, err = _check(capsys, "sft", tiny_model_dir, path)
    assert code == 2 and f"{path}:2" in err
    code, _, err = _check(capsys, "sft", "/nowhere/model", data(CHAT))
    assert code == 2 and "/nowhere/model" in err


def test_bad_evaluation_rows_are_found_too(capsys, data, tiny_model_dir):
    bad = data([{"messages": [{"role": "user", "content": "three"}]}], "bad.jsonl")
    code, _, err = _check(capsys, "sft", tiny_model_dir, data(CHAT), f"eval_dataset={bad}")
    assert code == 2 and "bad.jsonl:1: no assistant message" in err
    bad = data([{"prompt": ""}], "bad.jsonl")
    code, _, err = _check(capsys, "grpo", tiny_model_dir, data(SUMS), f"eval_dataset={bad}", "rewards=math_answer")
    assert code == 2 and "bad.jsonl:1: column 'prompt' is empty" in err
    code, out, _ = _check(capsys, "sft", tiny_model_dir, data(CHAT), "eval_fraction=0.3")
    assert code == 0 and "to evaluate on: 2 kept" in out


PAIRS = [
    {
        "prompt": [{"role": "user", "content": "three times four"}],
        "chosen": [{"role": "assistant", "content": f"twelve {i}"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for i in range(6)
]


@pytest.mark.parametrize(
    ("kind", "learned"),
    [
        ("dpo", ["⟦twelve 0<|im_end|>⟧", "⟦no<|im_end|>⟧", "learned tokens are"]),
        ("reward", ["twelve 0⟦<|im_end|>⟧", "no⟦<|im_end|>⟧", "the token where the score is read is"]),
    ],
)
def test_pairs(capsys, data, tiny_model_dir, kind, learned):
    """A side is 21 tokens of prompt and 6 or 3 of its own: 30 a pair instead of 27 + 24."""
    code, out, _ = _check(capsys, kind, tiny_model_dir, data(PAIRS), "batch_size=2")
    assert code == 0
    for text in (
        *learned,
        "6 pairs kept, 0 dropped",
        "180 tokens; 306 if each side had its own copy",
        "41% of their tokens saved",
        "chosen is longer in 100% and shorter in 0% of the pairs",
        "both begin with the same 21 tokens",
        "up to 60 tokens to learn from",
        "3, 1.00 passes over 6 pairs",
    ):
        assert text in out
    assert out.count("three times four") == 3  # once a pair
    terms = {line.split()[0] for line in out.partition("Memory")[2].splitlines() if line}
    assert ("head" in terms) == (kind == "dpo") and "reference" not in terms and "key-value" not in terms


def test_the_reference_of_dpo(capsys, data, tiny_model_dir):
    path = data(PAIRS)
    _, out, _ = _check(capsys, "dpo", tiny_model_dir, path)
    assert "log-probs by one pass before the first step" in out and "a frozen" not in out
    _, out, _ = _check(capsys, "dpo", tiny_model_dir, path, "reference_logprobs=on_the_fly")
    assert "a second forward of every microbatch" in out and "a frozen model beside the policy" in out
    _, out, _ = _check(capsys, "dpo", tiny_model_dir, path, "reference_logprobs=on_the_fly", "lora={}")
    assert "a second forward of every microbatch" in out and "a frozen" not in out
    _, out, _ = _check(capsys, "dpo", tiny_model_dir, path, "loss_type=simpo")
    assert "reference" not in out.partition("Batches")[2]


def test_dpo_without_rewards_is_offline(capsys, data, tiny_model_dir):
    path = data(SUMS)
    code, _, err = _check(capsys, "dpo", tiny_model_dir, path)
    assert code == 2 and f"{path}:1" in err and "chosen" in err
    code, out, _ = _check(
        capsys, "dpo", tiny_model_dir, path, "rewards=math_answer", "batch_size=2", "num_generations=4", "max_completion_length=20"
    )  # fmt: skip
    assert code == 0
    assert "2 prompts x 4 completions = 8 rollouts, of which the best and the worst make 2 pairs" in out
    assert "Rewards tried on" in out and "a frozen model beside the policy" in out and "key-value cache" in out


def test_outcomes(capsys, data, tiny_model_dir):
    rows = [{"prompt": "2+3=", "completion": str(i), "label": i == 5} for i in range(6)]
    code, out, _ = _check(capsys, "reward", tiny_model_dir, data(rows), "loss_type=outcome")
    assert code == 0
    for text in ("2+3=0⟦<|im_end|>⟧", "label 0.167 on average", "(6 tokens, label 0)", "passes over 6 rows"):
        assert text in out


def test_ppo(capsys, data, tiny_model_dir):
    code, out, _ = _check(
        capsys, "ppo", tiny_model_dir, data(SUMS), "rewards=math_answer", "batch_size=4", "updates_per_step=2", "max_completion_length=20"
    )  # fmt: skip
    assert code == 0
    assert "4 prompts x 1 completion = 4 rollouts" in out
    assert "8 a step (updates_per_step 2 x num_iterations 4)" in out
    assert "the reference, boxed" in out and "a frozen model beside the policy" in out and "critic" not in out
    _, out, _ = _check(
        capsys, "ppo", tiny_model_dir, data(SUMS), "rewards=math_answer", "preset=orz_ppo", "critic=separate"
    )
    assert "critic: weights" in out and "critic: optimizer" in out and "a frozen" not in out


def test_a_reward_model_is_tried_and_counted(capsys, data, tiny_model_dir, tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model_dir, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    tiny_tokenizer.save_pretrained(tmp_path / "rm")
    code, out, _ = _check(
        capsys, "ppo", tiny_model_dir, data(SUMS), f"rewards=[{{model: {tmp_path}/rm, name: liked}}]", "max_completion_length=20"
    )  # fmt: skip
    assert code == 0 and "liked x 1" in out and "frozen, to score with" in out
    assert "none" not in out.partition("Rewards tried")[2].partition("A completion ends")[0]


def test_bad_pairs_end_with_one_message(capsys, data, tiny_model_dir):
    path = data([*PAIRS, {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}])
    for kind in ("dpo", "reward"):
        code, _, err = _check(capsys, kind, tiny_model_dir, path)
        assert code == 2 and f"{path}:7" in err


def test_real_pairs(capsys, tiny_model_dir):
    path = shared_data("pref_hh_test.jsonl")
    for kind in ("dpo", "reward"):
        code, out, _ = _check(capsys, kind, tiny_model_dir, path, "dataset.max_rows=30", "on_overlong=truncate")
        assert code == 0 and "both begin with the same" in out and "rejected," in out


def test_real_prompts(capsys, tiny_model_dir):
    path = shared_data("eval_gsm8k.jsonl")
    code, out, _ = _check(
        capsys, "grpo", tiny_model_dir, path, "dataset.columns={prompt: question}", "dataset.max_rows=50", "rewards=math_answer",
        "max_prompt_length=256", "max_completion_length=100",
    )  # fmt: skip
    assert code == 0 and "the reference, boxed" in out


def test_rollouts_of_a_server_take_no_cache_here(capsys, data, tiny_model_dir):
    settings = ["rewards.0.function=exact_match", "max_steps=1", "max_completion_length=8"]
    local = _check(capsys, "grpo", tiny_model_dir, data(SUMS), *settings)
    server = [*settings, "rollout.engine=vllm_server", "rollout.urls=[http://127.0.0.1:1]", "rollout.max_staleness=1"]
    code, out, _ = _check(capsys, "grpo", tiny_model_dir, data(SUMS), *server)
    assert local[0] == code == 0 and "key-value cache" in local[1] and "key-value cache" not in out
    assert "sampled by http://127.0.0.1:1, up to 1 steps ahead" in out


def test_what_saves_memory_is_in_the_estimate(capsys, data, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = data(CHAT)

    def size(out, term):
        return next(line for line in out.splitlines() if line.startswith(f"{term} ")).split()[1]

    _, plain, _ = _check(capsys, "sft", tiny_model_dir, path)
    _, eight, _ = _check(capsys, "sft", tiny_model_dir, path, "optimizer=adamw_8bit")
    assert "in 8 bits but for embeddings" in eight and float(size(eight, "optimizer")) < float(size(plain, "optimizer"))
    # the launcher's request to shard divides what it divides: weights, gradients and moments
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    _, sharded, _ = _check(capsys, "sft", tiny_model_dir, path)
    assert "Memory of one process on the CPU under fsdp2" in sharded and "gathered layers" in sharded
    for term in ("weights", "optimizer", "gradients"):
        assert f"{float(size(plain, term)) / 2:.1f}" == size(sharded, term)
    code, _, err = _check(capsys, "sft", tiny_model_dir, path, "optimizer=adamw_8bit")
    assert code == 2 and "does not go with fsdp2" in err
