"""Drawn tokens follow the processed distribution exactly, and their random numbers depend on nothing but their key."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
import torch

from llmrl.rollout.sampling import draw, group_seed, uniforms
from llmrl.types import Sampling

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.0, -0.5, 0.2, -8.0], dtype=torch.float64)

SETTINGS = {
    "plain": Sampling(1),
    "temperature": Sampling(1, temperature=0.6),
    "hot": Sampling(1, temperature=3.0),
    "top_k": Sampling(1, top_k=4),
    "top_p": Sampling(1, top_p=0.8),
    "min_p": Sampling(1, min_p=0.15),
    "all": Sampling(1, temperature=1.4, top_k=7, top_p=0.9, min_p=0.2),
    "top_p keeps one": Sampling(1, top_p=1e-9),
    "top_k over the vocabulary": Sampling(1, top_k=99),
}


def processed(logits: torch.Tensor, s: Sampling) -> np.ndarray:
    """The distribution by its definition, one token at a time (written apart from the code under test)."""
    p = [math.exp(x / s.temperature) for x in logits.tolist()]
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if s.top_k:
        order = order[: s.top_k]
    mass, kept, have = sum(p[i] for i in order), [], 0.0
    for i in order:
        if have >= s.top_p * mass:
            break
        kept.append(i)
        have += p[i]
    kept = [i for i in kept if p[i] >= s.min_p * p[order[0]]]
    out = np.zeros(len(p))
    out[kept] = np.array(p)[kept] / sum(p[i] for i in kept)
    return out


@pytest.mark.parametrize("name", SETTINGS)
def test_every_interval_of_the_uniform_has_its_tokens_probability(name):
    """Evenly spaced uniforms hit each token in proportion to its probability, to the spacing: sharper than a random test."""
    n, expected = 20_000, processed(LOGITS, SETTINGS[name])
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, logprobs = draw(LOGITS.expand(n, -1), SETTINGS[name], u)
    counts = np.bincount(tokens.numpy(), minlength=len(expected))
    assert np.abs(counts / n - expected).max() <= 1.5 / n
    assert torch.allclose(logprobs, torch.from_numpy(expected).log()[tokens], atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "temperature", "all"])
def test_chi_square_of_the_keyed_numbers(name):
    setting, n = SETTINGS[name], 8000
    expected = processed(LOGITS, setting)
    u = torch.tensor([next(uniforms(setting, f"p{i % 40}", i // 40)) for i in range(n)])
    tokens, _ = draw(LOGITS.float().expand(n, -1), setting, u)
    counts = np.bincount(tokens.numpy(), minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    big = expected * n >= 5
    chi2 = ((counts[big] - expected[big] * n) ** 2 / (expected[big] * n)).sum()
    k = big.sum() - 1
    assert chi2 < k + 4 * math.sqrt(
        2 * k
    )  # about four standard deviations; the numbers are fixed, so this never flickers


def test_the_inverse_is_that_of_a_float64_running_sum_on_a_large_vocabulary():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5003, generator=g) * 3
    u = torch.rand(64, generator=g, dtype=torch.float64)
    tokens, logprobs = draw(logits, Sampling(1, temperature=0.8), u)
    p = torch.softmax(logits.double() / 0.8, -1)
    want = torch.searchsorted(p.cumsum(-1), u[:, None], right=True).squeeze(1)
    assert torch.equal(tokens, want)
    assert torch.allclose(logprobs.double(), p.log().gather(1, want[:, None]).squeeze(1), atol=1e-5)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_of_probability_zero_is_never_drawn_at_the_ends(u, dtype):
    logits = torch.full((3, 700), float("-inf"), dtype=dtype)
    logits[0, 300], logits[1, [0, 699]], logits[2, [5, 6, 650]] = 1.0, 0.0, torch.tensor([0.0, 40.0, 0.0], dtype=dtype)
    tokens, logprobs = draw(logits, Sampling(1), torch.full((3,), u, dtype=torch.float64))
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    assert tokens.tolist() == ([300, 0, 5] if u == 0 else [300, 699, 6])  # e^-40 of the mass is below 2^-53
    assert logprobs.isfinite().all()


def test_top_p_beyond_the_first_thousand_tokens():
    logits = torch.linspace(1, 0, 1600, dtype=torch.float64)[None]
    setting, n = Sampling(1, top_p=0.9), 8_000
    expected = processed(logits[0], setting)
    tokens, _ = draw(logits.expand(n, -1), setting, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    assert 1024 < (expected > 0).sum() < 1600
    assert set(tokens.tolist()) == set(np.nonzero(expected)[0].tolist())


def test_greedy_takes_the_likeliest_and_reports_temperature_one():
    tokens, logprobs = draw(LOGITS[None], Sampling(1, temperature=0, top_k=2), None)
    assert tokens.tolist() == [0]
    assert torch.allclose(logprobs, torch.log_softmax(LOGITS, -1)[:1])


@pytest.mark.parametrize(
    "setting", [Sampling(1), Sampling(1, temperature=0), Sampling(1, top_k=3, top_p=0.5, min_p=0.1)]
)
def test_logits_that_are_not_finite_are_told_and_do_not_touch_other_rows(setting):
    logits = LOGITS.repeat(4, 1)
    logits[0, 3], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    tokens, _ = draw(logits, setting, torch.full((4,), 0.1, dtype=torch.float64))
    assert tokens.tolist() == [-1, -1, -1, 0]


def test_uniforms_depend_on_every_part_of_the_key_and_only_on_it():
    def first(sampling: Sampling, prompt: str, index: int) -> tuple[float, ...]:
        return tuple(islice(uniforms(sampling, prompt, index), 100))

    base = Sampling(8, seed=1, step=2)
    assert first(base, "p", 0) == first(Sampling(20, seed=1, step=2, temperature=0.5), "p", 0)
    keys = [
        (base, "p", 0), (base, "p", 1), (base, "q", 0), (Sampling(8, seed=2, step=2), "p", 0), (Sampling(8, seed=1, step=3), "p", 0),
    ]  # fmt: skip
    numbers = [x for key in keys for x in first(*key)]
    assert len(set(numbers)) == 500
    assert all(0 <= x < 1 for x in numbers)


def test_group_seeds_differ_by_seed_step_and_prompt_and_leave_room_for_the_index():
    seeds = {
        group_seed(Sampling(8, seed=seed, step=step), prompt)
        for seed in range(5)
        for step in range(5)
        for prompt in ("a", "b", "1")
    }
    assert len(seeds) == 75
    assert all(0 <= s < 2**62 for s in seeds)
    assert group_seed(Sampling(8, seed=1, step=2), "a") == group_seed(Sampling(9, 0.5, seed=1, step=2), "a")
