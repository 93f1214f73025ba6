"""`llmrl plan`: from a recipe to a verdict."""

from __future__ import annotations

import re

import pytest
import yaml

from llmrl.cli.main import main


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """Writes a recipe of `keys` and plans it; (exit code, output)."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments, gpus=8, gpu="h100-80g", **keys):
        values = {
            "model_name_or_path": "llama-1b", "output_dir": "runs/x", "dataset": "rows.jsonl", "mixed_precision": "bf16",
            **keys,
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        code = main(["plan", str(tmp_path / "recipe.yaml"), "--gpus", str(gpus), "--gpu", gpu, *arguments])
        out, err = capsys.readouterr()
        return code, out + err

    return run


GRPO = {"rewards": "math_answer", "preset": "grpo", "num_generations": 8, "batch_size": 32, "lora": {"r": 8}}


def _row(text, name):
    return next(line.split() for line in text.splitlines() if line.startswith(f"{name} "))


def test_a_step_by_part(plan):
    code, text = plan(**GRPO, rollout={"engine": "vllm_colocate"})
    assert code == 0
    for name in ("generation", "log-probs", "update", "sync", "weights", "optimizer", "vLLM", "peak"):
        assert _row(text, name)
    assert "dominates the step" in text and "ddp fits" in text
    assert "256 completions of 256" in text


def test_assumptions_are_shown_and_scale_the_times(plan):
    keys = {"train_on": "all", "lora": {"r": 8}}
    _, slow = plan("--mfu", "0.2", **keys)
    _, fast = plan("--mfu", "0.4", **keys)
    assert "20% of peak" in slow and "40% of peak" in fast
    times = [float(_row(text, "update")[1]) for text in (slow, fast)]
    assert times[0] == pytest.approx(2 * times[1], rel=0.02)
    assert plan("--mfu", "40", **keys)[0] == 2


def test_what_does_not_fit_says_what_would(plan):
    keys = {
        "gpu": "rtx4090-24g",
        "train_on": "all",
        "tokens_per_microbatch": 1024,
        "max_length": 1024,
        "batch_size": 64,
    }
    code, text = plan(gpus=1, **keys)
    assert code == 1 and "Does not fit 1 GPU of this kind" in text
    gpus, name = re.search(r"([\d,]+) GPUs of this kind with (\S+)", text).groups()
    code, text = plan(gpus=int(gpus), **keys)
    assert code == 0 and _row(text, name)[3] == "fits"


def test_a_change_of_the_recipe_that_is_named_is_enough(plan):
    keys = {"train_on": "all", "tokens_per_microbatch": 65536, "batch_size": 64, "max_length": 2048, "lora": {"r": 8}}
    code, text = plan(gpus=1, gpu="a100-40g", **keys)
    assert code == 1
    changes = re.search(r"^  ((?:\S+=\S+ )+)with", text, re.MULTILINE).group(1).split()
    assert "gradient_checkpointing=true" in changes
    assert plan(*changes, gpus=1, gpu="a100-40g", **keys)[0] == 0


def test_servers_take_their_gpus_from_all(plan):
    rollout = {"engine": "vllm_server", "urls": ["http://a:1"], "max_staleness": 1}
    code, text = plan("--engine-gpus", "2", **GRPO, rollout=rollout)
    assert code == 0 and "vllm_server on 2 GPUs" in text and "6 GPUs train, sampling runs ahead" in text
    assert "the longer of generation and the rest" in text
    assert "engine-gpus is for recipes with" in plan("--engine-gpus", "2", **GRPO)[1]


def test_servers_are_named_where_more_gpus_would_do(plan):
    rollout = {"engine": "vllm_server", "urls": ["http://a:1"]}
    keys = {**GRPO, "lora": None, "gpu": "rtx4090-24g", "rollout": rollout, "tokens_per_microbatch": 1024}
    code, text = plan(gpus=2, **keys)
    assert code == 1
    gpus, engines = re.search(r"(\d+) GPUs of this kind with \S+ and --engine-gpus (\d+)", text).groups()
    assert plan("--engine-gpus", engines, gpus=int(gpus), **keys)[0] == 0


def test_a_smaller_cache_is_named(plan):
    keys = {**GRPO, "gpu": "rtx4090-24g", "gpus": 1, "max_completion_length": 4096, "tokens_per_microbatch": 2048}
    keys |= {"gradient_checkpointing": True, "model_name_or_path": "qwen3-0.6b"}
    code, text = plan(**keys)
    assert code == 1
    (change,) = re.findall(r"^  (rollout.max_batch_tokens=\d+) with", text, re.MULTILINE)
    assert plan(change, **keys)[0] == 0


def test_the_kind_is_found_or_asked_for(plan):
    code, text = plan(lora={"r": 8})
    assert code == 2 and "--kind dpo or --kind sft or --kind reward" in text
    assert plan("--kind", "sft", lora={"r": 8})[0] == 0


def test_a_critic_is_a_second_model(plan):
    keys = {"preset": "ppo", "lora": {"r": 8}}
    _, alone = plan("--kind", "ppo", **keys, rewards="math_answer")
    _, text = plan("--kind", "ppo", **keys, critic="separate", rewards={"model": "qwen2.5-1.5b"})
    assert _row(text, "critic: weights")[2] == _row(text, "weights")[1]
    assert _row(text, "reward models")[2] == "2.9"  # GiB: 1,543,714,304 tied parameters and a score, 2 bytes each
    assert "critic" not in alone and "reward models" not in alone


def test_an_engine_without_room_is_refused(plan):
    code, text = plan("--model", "llama-70b", **GRPO, gpus=8, gpu="a100-40g", rollout={"engine": "vllm_colocate"})
    assert code == 2 and "no engine fits" in text
