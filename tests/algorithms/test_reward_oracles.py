"""Loss, gradients and scores of the packed path equal the peer's padded ones, with the prompt shared or written out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from llmrl.algorithms.reward_model import RewardTrainer
from llmrl.config.reward_model import RewardConfig
from llmrl.types import Example
from tests.algorithms.recorded import gradients_of_update
from tests.conftest import ORACLES

ORACLE = json.loads((ORACLES / "reward.json").read_text())
CASES = {case["name"]: case for case in ORACLE["cases"]}


def sequences():
    rows = zip(ORACLE["inputs"]["input_ids"], ORACLE["inputs"]["attention_mask"])
    ids = [np.array(row[: sum(mask)], np.int32) for row, mask in rows]
    return [ids[i + side] for i in range(3) for side in (0, 3)]  # three chosen, then three rejected


def pairs(margins=(0.0, 0.0, 0.0)):
    out = []
    for i, ids in enumerate(sequences()):
        mask = np.zeros(len(ids), dtype=bool)
        mask[-1] = True
        out.append(Example(ids, mask, scalars={} if i % 2 else {"margin": margins[i // 2]}))
    return out


def trainer_of(tmp_path, tokenizer, examples, **settings):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(ORACLES / "rm_model", dtype=torch.float32)
    config = RewardConfig(
        model_name_or_path="oracle", output_dir=str(tmp_path), batch_size=3, max_steps=1, max_grad_norm=0.0, **settings
    )
    return RewardTrainer(config, model=model, tokenizer=tokenizer, train_dataset=examples, eval_dataset=examples)


@pytest.mark.parametrize("tokens_per_microbatch", [1, 60, 100_000])
@pytest.mark.parametrize("name", list(CASES))
def test_the_packed_path_equals_the_peers(tmp_path, tiny_tokenizer, name, tokens_per_microbatch):
    case, config = CASES[name], dict(CASES[name]["config"])
    examples = pairs(config.pop("margin", (0.0, 0.0, 0.0)))
    trainer = trainer_of(tmp_path, tiny_tokenizer, examples, tokens_per_microbatch=tokens_per_microbatch, **config)
    chosen, rejected = ORACLE["inputs"]["rewards"][:3], ORACLE["inputs"]["rewards"][3:]
    interleaved = [r for pair in zip(chosen, rejected) for r in pair]
    assert trainer._scores(trainer.eval_examples).tolist() == pytest.approx(interleaved, abs=1e-5)

    metrics = {}
    (gradients,) = gradients_of_update(trainer, lambda: metrics.update(trainer.update(trainer.examples)))
    assert metrics["loss"] == pytest.approx(case["loss"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(case["grad_norm"], rel=1e-5)
    for key in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert metrics[key] == pytest.approx(case["metrics"][key], abs=1e-5), key
    assert metrics["std_reward"] == pytest.approx(np.std(interleaved), abs=1e-5)
    assert gradients.keys() == case["grad_norms"].keys()
    for parameter, norm in case["grad_norms"].items():
        assert np.linalg.norm(gradients[parameter]) == pytest.approx(norm, rel=1e-5, abs=1e-6), parameter


def test_evaluation_counts_what_an_update_counts(tmp_path, tiny_tokenizer):
    case = CASES["bt_margin"]
    trainer = trainer_of(tmp_path, tiny_tokenizer, pairs(case["config"]["margin"]))
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(case["loss"], rel=1e-5)
    for key in ("accuracy", "margin", "mean_reward"):
        assert found[f"eval_{key}"] == pytest.approx(case["metrics"][key], abs=1e-5)
    # Wilson's interval of 0 of 3, with Student's quantile z at 2 degrees of freedom (its expansion: 3.85): z^2 / (3 + z^2).
    assert found["eval_accuracy_low"] == 0.0 and found["eval_accuracy_high"] == pytest.approx(0.8318, abs=1e-4)
    rewards = np.array(ORACLE["inputs"]["rewards"])
    certain = 1 / (1 + np.exp(-np.abs(rewards[:3] - rewards[3:])))  # each pair is wrong, with this confidence
    assert found["eval_calibration_error"] == pytest.approx(certain.mean(), abs=1e-5)
    lengths = np.array(ORACLE["inputs"]["attention_mask"]).sum(1)
    assert (lengths[:3] < lengths[3:]).tolist() == [True, False, True]
    assert found["eval_prefers_longer"] == pytest.approx(2 / 3)


def test_the_saved_model_scores_alike_in_transformers(tmp_path, tiny_tokenizer):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = tmp_path / "tokenizer"
    tiny_tokenizer.save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token  # transformers would take the end of an answer for padding
    trainer = trainer_of(tmp_path / "run", tokenizer, pairs(), learning_rate=1e-2)
    trainer.train()
    shutil.rmtree(source)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    texts = ["the answer is 12<|im_end|>", "because three<|im_end|>", "12 times<|im_end|><|im_end|>"]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model.eval()(**padded).logits[:, 0].tolist()
    examples = [
        Example(np.array(tokenizer(text)["input_ids"], np.int32), np.zeros(len(tokenizer(text)["input_ids"]), bool), i)
        for i, text in enumerate(texts)
    ]
    assert trainer._scores(examples).tolist() == pytest.approx(theirs, abs=1e-5)
    assert len(set(theirs)) == 3
