"""Models by name: parameter counts are those of the published weights."""

from __future__ import annotations

import pytest

from llmrl.config.model import ModelFields
from llmrl.errors import ConfigError
from llmrl.models.known import KNOWN, named_shape


def _shape(name, **fields):
    return named_shape(ModelFields(model_name_or_path=name, **fields))


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the safetensors files on the hub, tied heads once
    [
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("qwen/qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_parameters(name, parameters):
    assert _shape(name).parameters == parameters


def test_an_adapter_trains_little():
    # r (in + out) for each projection of a layer: q 2048+2048, k and v 2048+512, o 2048+2048, gate, up, down 2048+8192; 16 layers
    each = 2 * 4096 + 2 * 2560 + 3 * 10240
    assert _shape("llama-1b", lora={"r": 4}).trainable == 4 * each * 16


def test_a_scorer_has_a_score_instead_of_a_head():
    scorer = named_shape(ModelFields(model_name_or_path="llama-8b"), "SEQ_CLS")
    assert scorer.parameters == 8_030_261_248 - 128_256 * 4096 + 4096
    assert (scorer.head, _shape("llama-8b").head) == (0, 128_256 * 4096)


def test_a_directory_is_read(tiny_model_dir):
    assert _shape(str(tiny_model_dir)).layers > 0


def test_mixtures_of_experts_are_refused():
    with pytest.raises(ConfigError, match="mixture of experts"):
        _shape("qwen3-30b-a3b")


def test_unknown_names_list_what_is_near():
    with pytest.raises(ConfigError, match="llama-70b"):
        _shape("lama-70b")


def test_every_hub_id_stands_once():
    ids = [name for known in KNOWN.values() for name in known.hub]
    assert len(ids) == len(set(ids))
