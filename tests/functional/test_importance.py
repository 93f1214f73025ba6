"""The importance weights of stale and foreign samples: the gradient that they restore, and the sample size that they leave."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from llmrl.functional.importance import importance_weights, sampling_stats, sampling_summary
from llmrl.functional.objective import ObjectiveSettings, policy_objective
from llmrl.train.collectives import reduce_stats


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


REWARDS, STALE, OLD, NOW = t(1.0, -2.0, 0.5), t(0.5, 0.1, -0.7), t(0.2, -0.4, 0.6), t(0.3, -0.9, 1.1)


def gradient(cap, now, old, surrogate="ppo_clip", weights=True, **settings):
    """The gradient in the logits `now` in expectation over the tokens of the stale policy, every token enumerated."""
    logits = now.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, -1)
    old = logprobs.detach() if old is None else torch.log_softmax(old, -1)
    sampled = torch.log_softmax(STALE, -1)
    advantages = REWARDS * importance_weights(old, sampled, cap) if weights else REWARDS
    loss, _ = policy_objective(
        logprobs, old_logprobs=old, advantages=advantages, weights=sampled.exp(), sequence=torch.arange(3), num_sequences=3,
        token_share=1 / 3, settings=ObjectiveSettings(surrogate=surrogate, **settings),
    )  # fmt: skip
    return torch.autograd.grad(loss, logits)[0]


def on_policy_gradient(now):
    """That of minus the expected reward, in closed form: -p_i (r_i - E r)."""
    p = torch.softmax(now, -1)
    return -p * (REWARDS - (p * REWARDS).sum())


@pytest.mark.parametrize("surrogate", ["ppo_clip", "is_pg", "pg"])
def test_stale_samples_give_the_on_policy_gradient_without_a_cap(surrogate):
    """One update a step: old is the current policy, detached."""
    want = on_policy_gradient(NOW)
    torch.testing.assert_close(gradient(math.inf, NOW, None, surrogate), want, rtol=1e-12, atol=1e-15)
    errors = [(gradient(cap, NOW, None, surrogate) - want).abs().max().item() for cap in (1.0, 2.0, 4.0, 8.0)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.05 and errors[-1] < 1e-12  # no ratio here exceeds 8
    assert (gradient(math.inf, NOW, None, surrogate, weights=False) - want).abs().max() > 0.1


def test_later_updates_of_a_step_are_corrected_too():
    """old is fixed at the start of the step; the ratio to it and the weight of it multiply to current / sampled."""
    want = on_policy_gradient(NOW)
    torch.testing.assert_close(gradient(math.inf, NOW, OLD, "is_pg"), want, rtol=1e-12, atol=1e-15)
    wide = gradient(math.inf, NOW, OLD, "ppo_clip", epsilon=0.99, epsilon_high=9.0)
    torch.testing.assert_close(wide, want, rtol=1e-12, atol=1e-15)


def test_the_clip_is_around_old_and_not_around_what_sampled():
    """At the start of a step nothing is clipped, however stale the samples are; and the bounds are old's."""
    stale = t(3.0, -3.0, 0.0)
    logprobs, old = torch.log_softmax(OLD, -1), torch.log_softmax(OLD, -1)
    weights = importance_weights(old, torch.log_softmax(stale, -1), 2.0)
    _, stats = policy_objective(
        logprobs, old_logprobs=old, advantages=REWARDS * weights, weights=torch.ones(3) / 3, sequence=torch.arange(3),
        num_sequences=3, token_share=1 / 3, settings=ObjectiveSettings(epsilon=0.01),
    )  # fmt: skip
    assert stats["clip_ratio/region_mean"] == 0


# --- effective sample size --------------------------------------------------------------------------------------------


def summary(log_ratios, cap, parts, fresh=None, weights=None):
    """The summary of tokens with sampled log-probs 0, cut into `parts` (lists of indices), as microbatches or processes."""
    ratios = torch.as_tensor(log_ratios, dtype=torch.float64)
    weights = torch.ones(len(ratios)) if weights is None else weights
    share = 1 / int((weights != 0).sum())
    collected = []
    for part in parts:
        flags = None if fresh is None else torch.as_tensor(fresh, dtype=torch.float32)[part]
        stats = sampling_stats(ratios[part], torch.zeros(len(part)), weights[part], share, cap=cap, fresh=flags)
        collected.append({name: [float(value)] for name, value in stats.items()})
    return sampling_summary(reduce_stats(collected))


@pytest.mark.parametrize("value", [0.0, -3.0, 5.0])
def test_equal_weights_are_a_whole_sample(value):
    assert summary([value] * 7, 2.0, [list(range(7))])["sampling/ess"] == pytest.approx(1.0, rel=1e-12)
    assert summary([value] * 7, 2.0, [list(range(7))])["sampling/ess"] <= 1.0


@pytest.mark.parametrize("n", [2, 5, 64])
def test_one_token_with_all_the_weight_is_one_of_n(n):
    ratios = [0.0] + [-math.inf] * (n - 1)
    assert summary(ratios, 2.0, [list(range(n))])["sampling/ess"] == pytest.approx(1 / n, rel=1e-12)


def test_it_is_of_the_weights_as_they_are_used():
    ratios = [math.log(0.5), math.log(1.0), math.log(100.0), math.log(2.0)]
    found = summary(ratios, 2.0, [[0, 1, 2, 3]])
    used = [0.5, 1.0, 2.0, 2.0]
    assert found["sampling/ess"] == pytest.approx(sum(used) ** 2 / (4 * sum(w * w for w in used)), rel=1e-12)
    assert found["sampling/importance_capped"] == pytest.approx(0.25, rel=1e-12)
    assert found["sampling/importance_sampling_ratio/max"] == pytest.approx(100.0)  # the untruncated one, as ever
    assert not any("mean_square" in name or name.endswith("/sum") for name in found)


def test_it_does_not_depend_on_the_cut():
    torch.manual_seed(0)
    ratios, fresh = torch.randn(24, dtype=torch.float64), (torch.rand(24) < 0.5).float()
    weights = torch.ones(24)
    weights[20:] = 0.0  # what a process runs only to keep in step does not count
    whole = summary(ratios, 1.5, [list(range(24))], fresh, weights)
    order = torch.randperm(24).tolist()
    for cuts in ([5, 6, 20], [1] * 3, [12], []):
        ends = [0, *itertools.accumulate(cuts), 24] if sum(cuts) < 24 else [0, 5, 11, 24]
        parts = [order[a:b] for a, b in itertools.pairwise(ends)] + [[]]
        assert summary(ratios, 1.5, parts, fresh, weights) == pytest.approx(whole, rel=1e-12)
    alone = summary(ratios[:20], 1.5, [list(range(20))], fresh[:20])
    assert alone == pytest.approx(whole, rel=1e-12)
    assert whole["sampling/ess"] < 0.9


def test_the_gap_of_fresh_tokens_alone():
    ratios = [1.0, -0.25, 0.5, -3.0]
    found = summary(ratios, None, [[0, 1], [2, 3]], fresh=[0, 1, 1, 0])
    assert found["sampling/fresh_logp_difference/mean"] == pytest.approx(0.375, rel=1e-12)
    assert found["sampling/fresh_ratio"] == 0.5
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(4.75 / 4, rel=1e-12)
    none = summary(ratios, None, [[0, 1, 2, 3]], fresh=[0] * 4)
    assert none["sampling/fresh_ratio"] == 0.0 and "sampling/fresh_logp_difference/mean" not in none


def test_without_correction_and_without_stale_rollouts_nothing_is_added():
    stats = {name: float(value) for name, value in sampling_stats(t(-1.0), t(-2.0), t(1.0), 1.0).items()}
    assert sampling_summary(stats) == stats and len(stats) == 5
