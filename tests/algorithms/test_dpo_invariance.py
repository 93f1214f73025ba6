"""However the pairs of an update are cut, ordered, shared or spread over processes, the gradient is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmrl.data.packing import empty_pair, unshared
from tests.algorithms import dpo_worker
from tests.algorithms.pairs import dpo_trainer, random_pairs, reordered
from tests.algorithms.recorded import distance, gradients_of_update
from tests.processes import run_script

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
SETTINGS = [
    {"loss_type": "sigmoid", "label_smoothing": 0.1},
    {"loss_type": ["sigmoid", "bco", "nll"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": "ipo", "length_normalized": True},
    {"loss_type": "sigmoid", "ld_alpha": 0.3},
    {"loss_type": "apo_zero", "beta": 0.5},
    {"loss_type": "robust", "label_smoothing": 0.2, "f_divergence_type": "js_divergence"},
    {"loss_type": "simpo", "beta": 2.0},
    {"loss_type": "orpo"},
]


def gradients(path, out, pairs, dtype=torch.float64, **settings):
    trainer = dpo_trainer(path, out, pairs, dtype, **settings)
    return gradients_of_update(trainer, lambda: trainer.update(trainer.examples))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_cuts_orders_and_sharing(tiny_model_dir, tmp_path, dtype, settings):
    pairs = random_pairs()
    whole = gradients(tiny_model_dir, tmp_path / "a", pairs, dtype, tokens_per_microbatch=10_000, **settings)
    others = {
        "one by one": gradients(tiny_model_dir, tmp_path / "b", pairs, dtype, tokens_per_microbatch=1, **settings),
        "reordered": gradients(
            tiny_model_dir, tmp_path / "c", reordered(pairs, [4, 0, 8, 2, 6, 1, 3, 7, 5]), dtype, tokens_per_microbatch=70, **settings
        ),
        "repeated prompts": gradients(tiny_model_dir, tmp_path / "d", unshared(pairs), dtype, **settings),
    }  # fmt: skip
    assert all(np.linalg.norm(g) > 0 for n, g in whole.items() if "bias" not in n)
    for name, grads in others.items():
        assert distance(whole, grads) < BOUND[dtype], name


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_empty_pairs_add_nothing(tiny_model_dir, tmp_path, settings):
    trainer = dpo_trainer(tiny_model_dir, tmp_path, random_pairs(2), **settings)
    batch = trainer.packed(empty_pair(scalars=("weights", "ref_logprobs")))
    loss, stats = trainer._loss(batch, trainer._sums(batch, trainer.module(batch).logprobs), 0.1)
    loss.backward()
    assert loss.item() == 0 and not any(float(v) for v in stats.values())
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_a_pair_drawn_twice_counts_twice(tiny_model_dir, tmp_path):
    pairs = random_pairs(3)
    trainer = dpo_trainer(tiny_model_dir, tmp_path, pairs, tokens_per_microbatch=40)
    twice = [trainer.examples[i] for i in (0, 1, 2, 3, 0, 1)]
    copies = reordered(trainer.examples, [0, 1]) + reordered(trainer.examples, [0])
    got, want = {}, {}
    a = gradients_of_update(trainer, lambda: got.update(trainer.update(twice)))[0]
    other = dpo_trainer(tiny_model_dir, tmp_path / "b", reordered(pairs, [0, 1, 0]))
    b = gradients_of_update(other, lambda: want.update(other.update(other.examples)))[0]
    assert copies == twice and distance(a, b) < 1e-12
    assert got["logps/chosen"] == pytest.approx(want["logps/chosen"], rel=1e-12)


def run(case, model_dir, tmp_path, processes):
    """One process is this one; the other two are forks."""
    file = tmp_path / f"{processes}.npz"
    arguments = [case, str(model_dir), str(tmp_path / f"{processes}"), str(file)]
    if processes == 1:
        dpo_worker.main(*arguments)
    else:
        done = run_script(Path(dpo_worker.__file__), *arguments, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(file))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["offline", "one_pair", "on_the_fly", "online"])
def test_one_and_two_processes(case, tiny_model_dir, tmp_path):
    """`one_pair` leaves the second process idle; every number that is logged is the same, too."""
    one, two = (run(case, tiny_model_dir, tmp_path, n) for n in (1, 2))
    assert one.pop("world_size") == 1 and two.pop("world_size") == 2
    numbers = [{n: float(r.pop(n)) for n in list(r) if n.startswith("metrics/")} for r in (one, two)]
    assert numbers[0].keys() == numbers[1].keys() and len(numbers[0]) > 10
    for name, value in numbers[0].items():
        if "seconds" not in name:
            assert numbers[1][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert distance(one, two) < 1e-12
