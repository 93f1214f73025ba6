"""The keys that save memory: what they are refused beside."""

from __future__ import annotations

import pytest

from llmrl.config.base import RecipeError
from llmrl.config.load import CONFIGS

BASE = {"model_name_or_path": "m", "output_dir": "o"}


@pytest.mark.parametrize(
    ("kind", "keys", "why"),
    [
        ("grpo", {"beta": 0.0}, "beta is 0 and loads no reference"),
        ("grpo", {"preset": "dr_grpo"}, "beta is 0 and loads no reference"),
        ("grpo", {"lora": {}}, "the model without its adapter"),
        ("ppo", {"preset": "orz_ppo"}, "not to the initial model, or its weight is 0"),
        ("ppo", {"lora": {}}, "the model without its adapter"),
        ("dpo", {"loss_type": "simpo"}, "simpo has no reference"),
        ("dpo", {}, "precompute keeps no reference while training"),
        ("dpo", {"reference_logprobs": "on_the_fly", "lora": {}}, "the model without its adapter"),
    ],
)
def test_a_reference_that_is_not_there_can_not_be_moved(kind, keys, why):
    with pytest.raises(RecipeError, match=f"offload_reference: .*{why}.* leave it out"):
        CONFIGS[kind](**BASE, **keys, offload_reference=True)
    assert not CONFIGS[kind](**BASE, **keys).offload_reference


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("grpo", {}),
        ("ppo", {}),
        ("ppo", {"beta": 0.0, "kl_controller": "lagrange", "kl_target": 0.1}),
        ("dpo", {"reference_logprobs": "on_the_fly"}),
        ("dpo", {"sync_ref_model": True}),
        ("dpo", {"rewards": "f"}),
        ("dpo", {"reference_logprobs": "on_the_fly", "lora": {}, "ref_model_name_or_path": "r"}),
    ],
)
def test_a_reference_that_is_there_can(kind, keys):
    assert CONFIGS[kind](**BASE, **keys, offload_reference=True).offload_reference


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_trainers_without_a_reference_do_not_know_the_key(kind):
    with pytest.raises(RecipeError, match="offload_reference"):
        CONFIGS[kind](**BASE, offload_reference=True)


@pytest.mark.parametrize(("name", "key"), [("load_in_4bit", "quantization"), ("optim", "optimizer")])
def test_names_of_peers_are_answered(name, key):
    with pytest.raises(RecipeError, match=f"write {key}: "):
        CONFIGS["sft"](**BASE, **{name: "x"})
