"""Our log-probs of choices and lm-eval's, on the same model and rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import shared_data

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_the_same_choices_as_lm_eval(name, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'llmrl[bench]')")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import lm_eval_arc

    data = shared_data(f"eval_{name}.jsonl")
    found = lm_eval_arc.compare(lm_eval_arc.small_model(data, tmp_path), data, 200)
    assert found["rows"] == 200 and found["different"] == []
    assert found["largest_logprob_difference"] < 1e-3
