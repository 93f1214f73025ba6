"""The sampler: every row once an epoch, resumable at any point, the same under every numpy."""

from __future__ import annotations

import json

import pytest

from llmrl.data.sampler import Sampler, permutation
from llmrl.errors import DataError


def test_every_row_once_an_epoch_and_another_order_each():
    sampler = Sampler(10, seed=3)
    first, second = sampler.take(10), sampler.take(10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != list(range(10))


def test_take_crosses_epochs_and_does_not_depend_on_step_size():
    whole = Sampler(7, seed=1).take(30)
    sampler = Sampler(7, seed=1)
    assert [i for k in (1, 9, 0, 20) for i in sampler.take(k)] == whole
    assert sampler.epoch == pytest.approx(30 / 7)


def test_sequential():
    assert Sampler(3, seed=5, shuffle=False).take(5) == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("taken", [0, 3, 7, 8, 21])
def test_resume_at_any_point(taken):
    sampler = Sampler(7, seed=2)
    sampler.take(taken)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = Sampler(7, seed=2)
    resumed.take(5)
    resumed.load_state_dict(state)
    assert resumed.take(20) == sampler.take(20)


@pytest.mark.parametrize(("name", "other"), [("n", Sampler(8, seed=2)), ("seed", Sampler(7, seed=3))])
def test_resume_over_other_data_is_refused(name, other):
    with pytest.raises(DataError, match=f"sampler has {name}"):
        other.load_state_dict(Sampler(7, seed=2).state_dict())


def test_permutation_is_pinned():
    """The order is part of what a checkpoint relies on; if this fails, old runs can't be resumed."""
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, -1, 1).tolist() != permutation(8, 0, 1).tolist()


def test_empty():
    with pytest.raises(DataError, match="data is empty"):
        Sampler(0)
