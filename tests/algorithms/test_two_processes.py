"""One process and two gloo processes with unequal tokens make the same gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.algorithms import two_process_worker
from tests.algorithms.recorded import distance
from tests.processes import run_script


def run(case, model_dir, tmp_path, processes):
    """One process is this one; the other two are forks."""
    file = tmp_path / f"{processes}.npz"
    arguments = [case, str(model_dir), str(tmp_path / f"{processes}"), str(file)]
    if processes == 1:
        two_process_worker.main(*arguments)
    else:
        done = run_script(Path(two_process_worker.__file__), *arguments, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(file))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft", "grpo", "one_group"])
def test_same_gradient(case, tiny_model_dir, tmp_path):
    one, two = (run(case, tiny_model_dir, tmp_path, n) for n in (1, 2))
    assert one.pop("world_size") == 1 and two.pop("world_size") == 2
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-12)
    first = [{n: g for n, g in result.items() if n.startswith("0/")} for result in (one, two)]
    assert distance(*first) < 1e-12
    # The later updates start from weights that differ by rounding; Adam's first steps are signs, so only where gradients are tiny.
    assert distance(one, two) < 1e-6
