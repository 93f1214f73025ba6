"""The importance correction that a recipe gets when it names none."""

from __future__ import annotations

import pytest

from llmrl.config.load import CONFIGS, dump_recipe, load_recipe

BASE = {"model_name_or_path": "m", "output_dir": "o"}
SERVER = {"engine": "vllm_server", "urls": ["http://127.0.0.1:8000"]}


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize(
    ("rollout", "chosen"),
    [
        ({}, "none"),
        ({"engine": "local"}, "none"),
        ({"engine": "vllm_colocate"}, "token_truncate"),
        (SERVER, "token_truncate"),
        ({**SERVER, "max_staleness": 2}, "token_truncate"),
    ],
)
def test_it_follows_from_the_engine_and_round_trips(tmp_path, kind, rollout, chosen):
    config = CONFIGS[kind](**BASE, rollout=rollout)
    assert config.importance_correction == chosen and not config.uncorrected
    assert CONFIGS[kind](**BASE, rollout=rollout, importance_correction=None) == config
    path = tmp_path / "c.yaml"
    path.write_text(dump_recipe(config))
    assert f"importance_correction: {chosen}\n" in path.read_text()
    assert load_recipe(kind, path) == config


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_what_a_recipe_says_stays(kind):
    local = CONFIGS[kind](**BASE, importance_correction="token_truncate")
    assert local.importance_correction == "token_truncate"
    stale = CONFIGS[kind](**BASE, rollout={**SERVER, "max_staleness": 1}, importance_correction="none")
    assert stale.importance_correction == "none" and stale.uncorrected
    assert not CONFIGS[kind](**BASE, rollout=SERVER, importance_correction="none").uncorrected


def test_online_dpo_takes_stale_rollouts_and_has_no_weights():
    config = CONFIGS["dpo"](**BASE, rollout={**SERVER, "max_staleness": 2}, rewards="math_answer")
    assert config.rollout.max_staleness == 2 and "importance_correction" not in type(config).model_fields
