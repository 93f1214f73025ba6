"""`rollout` of a recipe: keys that the engine, or the transfer, would not read are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llmrl.config.rollout import RolloutSettings

URL = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_staleness": 1}, "rollout.max_staleness is for engine vllm_server"),
        ({"engine": "vllm_colocate", "urls": [URL]}, "rollout.urls is for engine vllm_server"),
        ({"engine": "vllm_server", "urls": [URL], "sleep_level": 0}, "rollout.sleep_level is for engine vllm_colocate"),
        ({"engine": "vllm_server"}, "needs rollout.urls"),
        ({"engine": "vllm_server", "urls": ["127.0.0.1:8000"]}, "is not a URL"),
        ({"engine": "vllm_server", "urls": [URL, URL + "/"]}, "names a server twice"),
        ({"engine": "vllm_server", "urls": [URL], "nccl_address": "10.0.0.1"}, "the transfer is disk"),
    ],
)
def test_what_would_not_be_read_is_refused(settings, match):
    with pytest.raises(ValidationError, match=match):
        RolloutSettings(**settings)


def test_what_is_read_passes():
    settings = RolloutSettings(engine="vllm_server", urls=[URL], transfer="nccl", nccl_address="10.0.0.1")
    assert settings.nccl_address == "10.0.0.1"
