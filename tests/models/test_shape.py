"""The sizes of models of every family."""

import pytest

from llmrl.models.shape import shape_of
from tests.models.families import ONE_BY_ONE, PACKED, make


@pytest.mark.parametrize("family", [*PACKED, *ONE_BY_ONE])
def test_every_family_has_a_shape(family):
    model = make(family)
    shape = shape_of(model)
    assert shape.parameters == model.num_parameters()
    assert (shape.attention_share == 0) == (family == "mamba")  # no attention, and so nothing grows with the square
