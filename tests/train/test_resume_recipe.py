"""Which recipes may continue a checkpoint, and what is said about the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llmrl.errors import ConfigError
from llmrl.train.resume import check_recipe

REWARD = {"function": "math_answer", "weight": 1.0, "args": {"a": 1}, "a_long_key_that_comes_first": "x" * 100}


def check(theirs, ours):
    config = SimpleNamespace(model_dump=lambda mode: {"rewards": ours})
    check_recipe({"kind": "grpo", "recipe": {"rewards": theirs}}, config, "grpo", Path("step_1"))


def test_an_entry_may_have_keys_of_a_newer_version():
    check([REWARD], [{**REWARD, "new_key": None}])


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ([{**REWARD, "weight": 0.5}], r"rewards\.0\.weight: 1\.0 -> 0\.5"),
        ([{**REWARD, "args": {"a": 1, "b": 2}}], r"rewards\.0\.args"),
        ([REWARD, REWARD], "rewards: .*1 of them.* -> .*2 of them"),
        ([], "rewards: .*1 of them"),
    ],
)
def test_what_differs_in_an_entry_is_named(ours, said):
    with pytest.raises(ConfigError, match=said) as caught:
        check([REWARD], ours)
    assert "a_long_key_that_comes_first: " not in str(caught.value) or not ours
