"""What `llmrl serve` starts, against the real thing."""

from __future__ import annotations

import httpx
import pytest


@pytest.mark.slow
def test_answers_with_the_token(vllm_server):
    assert httpx.get(f"{vllm_server.url}/health", headers=vllm_server.headers).status_code == 200
    assert httpx.get(f"{vllm_server.url}/health").status_code == 401
