"""Every value that a preset or the recipe's types name resolves in a registry of `functional`, and the other way round."""

from typing import get_args

import pytest

from llmrl.config.grpo import GRPOConfig
from llmrl.config.presets import GRPO_PRESETS
from llmrl.functional.advantages import SCALES
from llmrl.functional.aggregate import AGGREGATIONS
from llmrl.functional.kl import KL_ESTIMATORS
from llmrl.functional.objective import ObjectiveSettings
from llmrl.functional.surrogates import RATIO_LEVELS

REGISTRIES = {
    "scale_rewards": SCALES,
    "aggregation": AGGREGATIONS,
    "kl_estimator": KL_ESTIMATORS,
    "importance_sampling_level": RATIO_LEVELS,
}


@pytest.mark.parametrize("preset", GRPO_PRESETS)
def test_presets_resolve(preset):
    for axis, registry in REGISTRIES.items():
        assert GRPO_PRESETS[preset][axis] in registry


@pytest.mark.parametrize("axis", REGISTRIES)
def test_recipes_offer_exactly_what_exists(axis):
    assert set(get_args(GRPOConfig.model_fields[axis].annotation)) == set(REGISTRIES[axis])


def test_objective_settings_are_fields_of_the_recipe():
    assert set(ObjectiveSettings.__dataclass_fields__) <= set(GRPOConfig.model_fields)
