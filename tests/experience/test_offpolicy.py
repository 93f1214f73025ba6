"""How stale rollouts are, which of them are fresh, and when the run says that they are too stale."""

from __future__ import annotations

import logging

import pytest

from llmrl.data.packing import pack
from llmrl.experience.batch import merge_update_metrics, to_examples
from llmrl.experience.collect import Experience, Group
from llmrl.experience.offpolicy import SampleSizeWatch, fresh_tokens, is_fresh, staleness_metrics
from llmrl.types import Completion, Prompt, Rollout, ScoredRollout


def scored(n, version=0, versions=(), index=0):
    completion = Completion(tuple(range(1, n + 1)), (-1.0,) * n, "stop", "", version, tuple(versions))
    return ScoredRollout(Rollout(Prompt("p", (1, 2), ""), completion, index), 1.0, {})


def alone(value):
    return [value]


def test_staleness_is_a_mean_over_tokens():
    rollouts = [scored(3, version=5), scored(1, version=3), scored(4, version=4, versions=(4, 4, 5, 5))]
    found = staleness_metrics(rollouts, 5, alone)
    assert found == {
        "rollout/staleness/mean": pytest.approx((3 * 0 + 1 * 2 + 2 * 1) / 8),
        "rollout/staleness/max": 2.0,
        "rollout/mixed_versions": pytest.approx(1 / 3),
    }
    assert staleness_metrics([scored(2, version=4, versions=(4, 4))], 5, alone)["rollout/mixed_versions"] == 0.0


def test_staleness_is_over_all_processes():
    parts = [[scored(3, version=5)], [scored(1, version=3), scored(4, version=4, versions=(4, 4, 5, 5))], []]
    sent = []
    for part in parts:
        staleness_metrics(part, 5, lambda value: [sent.append(value) or value])
    together = staleness_metrics(parts[0], 5, lambda value: sent)
    assert together == staleness_metrics([r for part in parts for r in part], 5, alone)
    assert staleness_metrics([], 5, alone) == {}


def test_a_mixed_completion_has_no_fresh_token():
    assert is_fresh(scored(2, version=5).rollout.completion, 5)
    assert not is_fresh(scored(2, version=4).rollout.completion, 5)
    assert not is_fresh(scored(2, version=4, versions=(4, 5)).rollout.completion, 5)
    assert not is_fresh(scored(2, version=4, versions=(5, 5)).rollout.completion, 5)  # behind a prompt cached under 4


@pytest.mark.parametrize("unit_tokens", [0, 100])
def test_the_flag_reaches_the_tokens_in_the_loss(unit_tokens):
    group = Group(0, [scored(2, version=5), scored(3, version=4, index=1), scored(1, version=5, index=2)])
    experience = Experience(6, [group])
    batch = pack(to_examples(experience, unit_tokens=unit_tokens, version=5))
    assert fresh_tokens(batch).tolist() == [1, 1, 0, 0, 0, 1]
    assert fresh_tokens(pack(to_examples(experience, unit_tokens=unit_tokens))) is None


def test_a_number_that_only_some_updates_have():
    updates = [{"loss": 1.0}, {"loss": 3.0, "sampling/fresh_logp_difference/mean": 0.5}, {}]
    assert merge_update_metrics(updates) == {"loss": 2.0, "sampling/fresh_logp_difference/mean": 0.5}


def test_few_effective_samples_are_said_once_in_a_while(caplog):
    watch = SampleSizeWatch()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 251):
            watch(step, {"sampling/ess": 0.49 if step >= 20 else 0.5})
    assert [record.args[0] for record in caplog.records] == [20, 120, 220]
    assert "0.49 of the tokens" in caplog.text and "lower rollout.max_staleness" in caplog.text
    caplog.clear()
    SampleSizeWatch()(1, {"loss": 1.0})
    assert not caplog.records


def test_stale_rollouts_without_correction_are_warned_of_once(caplog):
    watch = SampleSizeWatch(uncorrected=True)
    watch(1, {}), watch(2, {})
    assert len(caplog.records) == 1 and "importance_correction is none" in caplog.text
