"""Fake generation servers, for the tests that need one or two."""

from __future__ import annotations

import pytest

from tests.rollout.fake_vllm import FakeVLLM


@pytest.fixture
def fakes(tiny_model_dir):
    with FakeVLLM(tiny_model_dir) as one, FakeVLLM(tiny_model_dir) as two:
        yield [one, two]


@pytest.fixture
def fake(fakes):
    return fakes[0]
