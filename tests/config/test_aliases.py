"""Names of TRL, open-r1 and LLaMA-Factory: every one is a key here or is answered with what to write instead."""

from __future__ import annotations

import json
import re

import pytest

from llmrl.config.aliases import BY_KIND
from llmrl.config.base import RecipeError
from llmrl.config.data import DatasetSource
from llmrl.config.fields import all_keys
from llmrl.config.load import CONFIGS
from llmrl.config.model import LoraSettings
from llmrl.config.reward import RewardSpec
from tests.conftest import ORACLES

# field names of TRL's classes (read off the installed package), and keys of open-r1's and LLaMA-Factory's recipes that are not TRL's
NAMES = json.loads((ORACLES / "peer_names.json").read_text())
MODELS = {**CONFIGS, **{m.__name__: m for m in (DatasetSource, RewardSpec, LoraSettings)}}
REQUIRED = {"sft": {"output_dir": "o", "model_name_or_path": "m"}, "grpo": {"output_dir": "o", "model_name_or_path": "m"},
            "eval": {"data": "d", "model_name_or_path": "m"}}  # fmt: skip


def _answer(kind: str, name: str) -> str | None:
    """None if `name` is a key, else what the error says about it."""
    if name in CONFIGS[kind].model_fields:
        return None
    with pytest.raises(RecipeError) as error:
        CONFIGS[kind](**REQUIRED[kind], **{name: 1})
    return dict(error.value.problems)[name]


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("sft", "SFTConfig"),
        ("grpo", "GRPOConfig"),
        *[(k, s) for k in ("sft", "grpo") for s in ("ModelConfig", "ScriptArguments")],
    ],
)
def test_every_field_of_trl_is_a_key_or_is_answered(kind, source):
    assert len(NAMES[source]) > 5
    unanswered = [
        n
        for n in NAMES[source]
        if "unknown key" in (_answer(kind, n) or "") or "is a key of" in (_answer(kind, n) or "")
    ]
    assert unanswered == []


@pytest.mark.parametrize(("kind", "names"), [("grpo", NAMES["open-r1"]), ("sft", NAMES["LLaMA-Factory"])])
def test_other_recipes(kind, names):
    assert [n for n in names if "unknown key" in (_answer(kind, n) or "")] == []


@pytest.mark.parametrize("kind", BY_KIND)
def test_aliases_are_not_keys_and_point_to_keys(kind):
    """An alias that is a key could never be shown; one that names a key that does not exist would send users astray."""
    model = MODELS[kind]
    assert [n for n in BY_KIND[kind] if n in model.model_fields] == []
    keys = {key for config in CONFIGS.values() for key, _ in all_keys(config)}
    keys |= {key.rpartition(".")[2] for key in keys}
    for name, message in BY_KIND[kind].items():
        target = re.match(r"write (\w+)\b(?!\s*instead)", message)
        if target and target[1] not in ("it", "the", "a"):
            assert target[1] in keys, (name, message)


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        ("grpo", {"scale_rewards": True}, "write group"),
        ("grpo", {"max_steps": -1}, "leave it out"),
        ("grpo", {"report_to": "none"}, "leave it out"),
        ("grpo", {"top_k": None}, "0 turns it off"),
        ("sft", {"loss_type": "chunked_nll"}, "write nll"),
        ("sft", {"dtype": "float16"}, "mixed_precision: fp16"),
        ("sft", {"mixed_precision": False}, "write no"),
        ("sft", {"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr_ratio"),
        ("sft", {"warmup_steps": 0.1}, "warmup_ratio"),
        ("sft", {"resume": True}, "write auto"),
    ],
)
def test_values_that_are_spelt_differently(kind, given, says):
    with pytest.raises(RecipeError) as error:
        CONFIGS[kind](**REQUIRED[kind], **given)
    (key,) = given
    assert says.lower() in dict(error.value.problems)[key].lower()


def test_several_at_once_in_one_error():
    with pytest.raises(RecipeError) as error:
        CONFIGS["grpo"](
            **REQUIRED["grpo"],
            per_device_train_batch_size=8,
            use_vllm=True,
            lora={"rank": 8},
            reward_funcs=["accuracy"],
        )
    assert {key for key, _ in error.value.problems} == {
        "per_device_train_batch_size",
        "use_vllm",
        "lora.rank",
        "reward_funcs",
    }
    for text in ("batch_size", "rollout.engine", "write r", "rewards"):
        assert text in str(error.value)
