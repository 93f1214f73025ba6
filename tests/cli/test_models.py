"""`llmrl init-model`, then training, checking and merging what it made, through the command line."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard

from llmrl.cli.main import main


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}", "answer": str(2 * i)} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sft.yaml").write_text(
        f"model_name_or_path: {folder}/init\noutput_dir: {folder}/sft\ndataset: {folder}/rows.jsonl\nbatch_size: 8\nmax_steps: 2\n"
        "learning_rate: 1e-3\nlora: {r: 4}\n"
    )
    (folder / "grpo.yaml").write_text(
        f"model_name_or_path: {folder}/init\noutput_dir: {folder}/grpo\ndataset: {folder}/rows.jsonl\nrewards: math_answer\nbatch_size: 2\n"
        "num_generations: 2\nmax_steps: 1\nmax_completion_length: 4\n"
    )
    sizes = "--vocab-size 300 --hidden-size 32 --num-layers 2 --num-heads 2 --max-position-embeddings 128".split()  # noqa: SIM905
    assert (
        main(["init-model", "--output", str(folder / "init"), "--train-files", str(folder / "rows.jsonl"), *sizes]) == 0
    )
    return folder


def test_init_model(work, capsys):
    config = json.loads((work / "init" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (32, 2, 128)
    assert main(["init-model", "--output", str(work / "init"), "--train-files", str(work / "rows.jsonl")]) == 2
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["init-model", "--output", "x"])
    assert stop.value.code == 2


def test_sft_with_an_adapter_then_merge(work, capsys):
    assert main(["sft", "--config", str(work / "sft.yaml")]) == 0
    assert (work / "sft" / "config.yaml").exists()
    card = ModelCard.load(work / "sft" / "model" / "README.md")
    assert card.data.tags == ["llmrl", "sft", "lora"] and "step 2 of 2" in card.text
    assert main(["merge", str(work / "sft" / "model"), str(work / "merged")]) == 0
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(work / "merged").state_dict()
    start = AutoModelForCausalLM.from_pretrained(work / "init").state_dict()
    assert merged.keys() == start.keys()
    assert any(not torch.equal(merged[k], start[k]) for k in merged)
    assert main(["merge", str(work / "sft" / "model"), str(work / "merged")]) == 2
    assert "not an empty directory" in capsys.readouterr().err


def test_grpo(work):
    assert main(["grpo", "--config", str(work / "grpo.yaml"), "seed=3"]) == 0
    saved = (work / "grpo" / "config.yaml").read_text()
    assert "seed: 3" in saved and "num_generations: 2" in saved
    assert len((work / "grpo" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_check(work, kind, capsys):
    assert main(["check", kind, "--config", str(work / f"{kind}.yaml")]) == 0
    out = capsys.readouterr().out
    assert "nothing found that would stop a run" in out and "trainable parameters" in out
