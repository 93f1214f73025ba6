"""However an update of pairs or outcomes is cut, ordered, shared or spread over processes: the same gradient and the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrl.algorithms.reward_model import RewardTrainer
from llmrl.config.reward_model import RewardConfig
from llmrl.data.packing import unshared
from llmrl.types import Example
from tests.algorithms.recorded import distance, gradients_of_update
from tests.algorithms.test_resume import whole_and_resumed
from tests.processes import run_script

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}


def random_pairs(n=9, seed=0):
    """Pairs with margins, soft labels and prompts of very unequal length, some of none."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(3, 384, rng.integers(low, high)).astype(np.int32)

    out = []
    for i in range(n):
        prompt = ids(0, 30) if i % 3 else ids(0, 1)
        chosen, rejected = np.concatenate([prompt, ids(2, 20)]), ids(2, 20)
        scalars = {"margin": float(rng.normal()), "soft_label": float(rng.random())}
        out.append(Example(chosen, np.zeros(len(chosen), bool), i, scalars=scalars))
        out.append(
            Example(rejected, np.zeros(len(rejected), bool), i, scalars=dict.fromkeys(scalars, 0.0), prefix=len(prompt))
        )
    return out


def random_outcomes(n=12, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        ids = rng.integers(3, 384, rng.integers(2, 40)).astype(np.int32)
        out.append(Example(ids, np.zeros(len(ids), bool), i, scalars={"label": float(rng.integers(0, 2))}))
    return out


def reward_trainer(path, out, examples=None, dtype=torch.float64, **settings):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype)
    examples = examples or random_pairs()
    config = RewardConfig(
        model_name_or_path=str(path), output_dir=str(out), batch_size=4, max_steps=1, max_grad_norm=0.0,
        learning_rate=1e-3, **settings,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(path)
    return RewardTrainer(config, model=model, tokenizer=tokenizer, train_dataset=examples, eval_dataset=examples)


def measured(path, out, examples, dtype=torch.float64, **settings):
    """(gradients, metrics of the update, metrics of an evaluation before it)."""
    trainer = reward_trainer(path, out, examples, dtype, **settings)
    evaluation, metrics = trainer.evaluate(), {}
    (gradients,) = gradients_of_update(trainer, lambda: metrics.update(trainer.update(trainer.examples)))
    return gradients, metrics, evaluation


def backwards(examples, width):
    units = [examples[i : i + width] for i in range(0, len(examples), width)]
    return [e for unit in units[::-1] for e in unit]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss_type", ["bradley_terry", "outcome"])
def test_cuts_and_orders(tiny_model_dir, tmp_path, dtype, loss_type):
    paired = loss_type == "bradley_terry"
    examples, width = (random_pairs(), 2) if paired else (random_outcomes(), 1)
    settings = {"loss_type": loss_type, **({"center_rewards_coefficient": 0.01} if paired else {})}
    whole = measured(tiny_model_dir, tmp_path / "a", examples, dtype, tokens_per_microbatch=10_000, **settings)
    for budget in (1, 90):
        other = measured(
            tiny_model_dir, tmp_path / f"{budget}", backwards(examples, width), dtype, tokens_per_microbatch=budget,
            **settings,
        )  # fmt: skip
        assert distance(whole[0], other[0]) < BOUND[dtype]
        for one, two in zip(whole[1:], other[1:]):
            assert one == pytest.approx(two, rel=BOUND[dtype] * 10, abs=BOUND[dtype])
    for name in ("loss", "accuracy", "mean_reward", "std_reward"):
        assert whole[1][name] == pytest.approx(whole[2][f"eval_{name}"], rel=1e-6)


def test_a_shared_prompt_changes_nothing(tiny_model_dir, tmp_path):
    shared = measured(tiny_model_dir, tmp_path / "a", random_pairs())
    written_out = measured(tiny_model_dir, tmp_path / "b", unshared(random_pairs()))
    # The model's norms round to float32, whatever its dtype, and attention adds up in another order here.
    assert distance(shared[0], written_out[0]) < 1e-6
    assert shared[2] == pytest.approx(written_out[2], rel=1e-6)


@pytest.mark.parametrize(("name", "value"), [("margin", 2.0), ("soft_label", 0.3)])
def test_margin_and_soft_label_reach_the_loss(tiny_model_dir, tmp_path, name, value):
    plain = [replace(e, scalars={}) for e in random_pairs(3)]
    other = [replace(e, scalars={name: value} if i == 2 else {}) for i, e in enumerate(plain)]
    scores = reward_trainer(tiny_model_dir, tmp_path / "s", plain)._scores(plain)
    d = (scores[0::2] - scores[1::2]).numpy()

    def loss(q, m):
        return np.mean(-q * np.log(1 / (1 + np.exp(m - d))) - (1 - q) * np.log(1 / (1 + np.exp(d - m))))

    q, m = np.ones(3), np.zeros(3)
    unchanged = loss(q, m)
    {"margin": m, "soft_label": q}[name][1] = value
    assert loss(q, m) != pytest.approx(unchanged, rel=1e-2)
    for directory, examples, expected in (("a", plain, unchanged), ("b", other, loss(q, m))):
        trainer = reward_trainer(tiny_model_dir, tmp_path / directory, examples)
        assert trainer.update(trainer.examples)["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gradient", "one_pair"])
def test_two_processes_make_the_same_gradient(case, tiny_model_dir, tmp_path):
    """Of one pair the second process has nothing, and runs an empty one."""
    from tests.algorithms import reward_worker  # which takes a function of this module

    reward_worker.main(case, str(tiny_model_dir), str(tmp_path / "1"), str(tmp_path / "1.npz"))
    script = Path(reward_worker.__file__)
    done = run_script(script, case, tiny_model_dir, tmp_path / "2", tmp_path / "2.npz", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (dict(np.load(tmp_path / f"{processes}.npz")) for processes in (1, 2))
    assert one.pop("world_size") == 1 and two.pop("world_size") == 2
    names = [n for n in one if n.startswith("metric/")]
    assert len(names) > 15
    for name in names:  # the evaluation follows a step, which divides by square roots of tiny gradients
        bound = 1e-6 if "eval" in name else 1e-12
        assert two.pop(name) == pytest.approx(one.pop(name), rel=bound, abs=bound), name
    assert distance(one, two) < 1e-12


@pytest.mark.slow
def test_kill_and_resume_is_exact(tiny_model_dir, tmp_path):
    from tests.algorithms import reward_worker

    whole, broken = whole_and_resumed(reward_worker, "resume", tiny_model_dir, tmp_path, kill_at=8, saved=5)
    for file in ("model/adapter_model.safetensors", "checkpoints/step_00000010/optimizer.safetensors"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()
