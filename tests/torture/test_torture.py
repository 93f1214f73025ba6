"""A few of `make torture`'s kills."""

from __future__ import annotations

import pytest

from tests.torture.torture import CASES, torture


@pytest.mark.slow
def test_killed_runs_end_as_unbroken_ones(tiny_model_dir, tmp_path):
    assert torture(tiny_model_dir, tmp_path, kills=len(CASES), seed=1) == len(CASES)
