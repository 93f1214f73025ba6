"""The client of one server, against a fake that speaks its protocol."""

from __future__ import annotations

import os
import stat
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from llmrl.errors import ConfigError
from llmrl.rollout.fingerprint import fingerprint
from llmrl.rollout.vllm_client import ServerFault, ServerGone, ServerRefused, VLLMServer, find_token
from tests.rollout.fake_vllm import GENERATE, FakeVLLM


@pytest.fixture
def fake(tiny_model_dir):
    with FakeVLLM(tiny_model_dir) as fake:
        yield fake


@pytest.fixture
def server(fake):
    server = VLLMServer(fake.url, fake.token, timeout=5)
    yield server
    server.close()


def request(ids=(5, 6, 7), **params):
    defaults = {"n": 1, "temperature": 1.0, "max_tokens": 4, "seed": 0, "logprobs": 0, "stop_token_ids": []}
    return {"token_ids": list(ids), "cache_salt": "x", "sampling_params": {**defaults, **params}}


@pytest.mark.parametrize("kind", ["500", "503"])
def test_an_error_status_is_a_fault_with_the_servers_own_words(fake, server, kind):
    fake.fail("/weight_info", kind)
    with pytest.raises(ServerFault, match=f"{fake.url}: /weight_info answered HTTP {kind}.*injected") as caught:
        server.weight_label()
    assert caught.value.status == int(kind) and caught.value.server == fake.url
    assert server.weight_label() == "default"


@pytest.mark.parametrize("kind", ["malformed", "not_an_object"])
def test_an_answer_that_is_not_a_json_object_is_a_fault(fake, server, kind):
    fake.fail(GENERATE, kind)
    with pytest.raises(ServerFault, match=r"malformed JSON|not with a JSON object"):
        server.generate(request(), 5)


@pytest.mark.parametrize("kind", ["drop", "cut"])
def test_a_lost_connection_is_gone(fake, server, kind):
    fake.fail(GENERATE, kind)
    with pytest.raises(ServerGone, match="generate failed"):
        server.generate(request(), 5)
    assert len(server.generate(request(), 5)["choices"]) == 1


def test_a_timeout_is_gone_and_ends_the_request_on_the_server(fake, server):
    fake.fail(GENERATE, "hang", seconds=30)
    start = time.monotonic()
    with pytest.raises(ServerGone, match=r"no answer in 0\.2 s"):
        server.generate(request(), 0.2)
    assert time.monotonic() - start < 20
    deadline = time.monotonic() + 20
    while not fake.aborted and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fake.aborted == 1


def test_up_and_down_and_up_again_on_the_same_client(fake, server):
    assert server.is_up()
    server.set_weight_label("run:3")
    fake.kill()
    assert not server.is_up()
    with pytest.raises(ServerGone, match="weight_info failed"):
        server.weight_label()
    fake.restart()
    assert server.is_up() and server.weight_label() == "default"


def test_a_wrong_token_is_refused_everywhere_and_never_quoted(fake):
    server = VLLMServer(fake.url, "wrong-token")
    for call in (
        server.is_up,
        server.describe,
        server.weight_label,
        server.pause,
        lambda: server.generate(request(), 5),
    ):
        with pytest.raises(ServerRefused, match=r"rollout\.token_file") as caught:
            call()
        assert "wrong-token" not in str(caught.value)
    assert fake.requests == []


def test_plain_vllm_is_told_from_a_server_that_can_prove_its_weights(fake, server):
    assert server.describe()["logprobs_mode"] == "processed_logprobs"
    fake.overrides["plain_vllm"] = True
    with pytest.raises(ServerFault, match="not one that `llmrl serve` started"):
        server.describe()


def test_weights_load_by_name_and_the_fingerprint_follows(fake, server, tmp_path):
    state = {k: torch.randn_like(v) for k, v in fake.model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, tmp_path / "w.safetensors")
    assert server.weights()[0].sum != fingerprint(state.values()).sum
    server.pause()
    server.start_update()
    server.update({"files": [str(tmp_path / "w.safetensors")]})
    server.finish_update("run:1")
    assert server.reset_prefix_cache()
    server.resume()
    assert server.weights()[0].sum == fingerprint(state.values()).sum and server.weight_label() == "run:1"
    spans = server.generate(request(), 5)["choices"][0]["weight_versions"]
    assert spans == [{"version": "run:1", "start": 0, "end": 4}]
    assert server.world_size() == 1


def test_an_update_with_a_file_that_is_not_there_is_a_fault(server, tmp_path):
    server.pause()
    server.start_update()
    with pytest.raises(ServerFault, match="update_weights answered HTTP 500"):
        server.update({"files": [str(tmp_path / "absent.safetensors")]})


def test_where_the_token_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMRL_SERVER_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"LLMRL_SERVER_TOKEN is not set and .*\.llmrl/token-8123 can't be read"):
        find_token("http://127.0.0.1:8123", None)
    home = tmp_path / ".llmrl" / "token-8123"
    home.parent.mkdir()
    home.write_text("from-home\n")
    given = tmp_path / "token"
    given.write_text("  ")
    assert find_token("http://127.0.0.1:8123", None) == "from-home"
    with pytest.raises(ConfigError, match="is empty"):
        find_token("http://127.0.0.1:8123", str(given))
    given.write_text("from-file\n")
    assert find_token("http://127.0.0.1:8123", str(given)) == "from-file"
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "from-environment")
    assert find_token("http://127.0.0.1:8123", str(given)) == "from-environment"


def test_a_url_that_is_none_is_a_config_error():
    with pytest.raises(ConfigError, match="http://host:port"):
        VLLMServer("http://127.0.0.1:port", "t")


def test_netrc_and_proxies_of_the_environment_are_not_used(fake, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password something\n")
    os.chmod(netrc, stat.S_IRUSR)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server = VLLMServer(fake.url, fake.token)
    assert server.is_up()
    server.close()
    server.close()


def test_a_token_made_here_is_sent_to_no_other_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMRL_SERVER_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".llmrl" / "token-8123"
    path.parent.mkdir()
    path.write_text("of-this-machine")
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert find_token(f"http://{host}:8123", None) == "of-this-machine"
    with pytest.raises(ConfigError, match=r"rollout\.token_file"):
        find_token("http://gpu-7:8123", None)
    assert find_token("http://gpu-7:8123", str(path)) == "of-this-machine"


def test_hanging_up_ends_what_is_in_flight_and_nothing_else(fake, server):
    fake.fail(GENERATE, "hang", seconds=60)
    errors = []

    def ask():
        try:
            server.generate(request(), 60)
        except ServerGone as error:
            errors.append(error)

    assert not server.is_asked
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while not fake.count(GENERATE):
        time.sleep(0.01)
    assert server.is_asked and server.is_up()
    server.hang_up()
    thread.join(20)
    assert len(errors) == 1 and not server.is_asked
    assert len(server.generate(request(), 20)["choices"]) == 1


def test_a_server_that_is_started_again_with_another_token_is_talked_to_with_that(fake, tmp_path, monkeypatch):
    monkeypatch.delenv("LLMRL_SERVER_TOKEN", raising=False)
    path = tmp_path / "token"
    path.write_text(fake.token)
    server = VLLMServer(fake.url, fake.token, timeout=5, renew=lambda: find_token(fake.url, str(path)))
    try:
        assert server.weight_label() == "default"
        fake.token = "the token of its next start"
        with pytest.raises(ServerRefused):
            server.weight_label()
        path.write_text(fake.token)
        assert server.weight_label() == "default" and server.is_up()
        path.unlink()
        assert server.weight_label() == "default"
        fake.token = "another"
        with pytest.raises(ServerRefused, match="token"):
            server.weight_label()
    finally:
        server.close()
