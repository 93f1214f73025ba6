"""The token on every route, the plugin, and the worker that takes weights from files: alone, and in a real server."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import httpx
import pytest

from llmrl.errors import ConfigError, LLMRLError
from llmrl.rollout import vllm_plugin
from llmrl.rollout.vllm_auth import RequireToken
from llmrl.rollout.vllm_server import claim

TOKEN = "a-token-of-enough-characters"
GOOD = (b"authorization", f"Bearer {TOKEN}".encode())


@pytest.fixture
def guarded(monkeypatch):
    """Asks an app behind the middleware; returns what was sent, with "app" in front when the app was reached."""
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", TOKEN)

    def ask(scope: dict) -> list:
        sent: list = []

        async def app(scope, receive, send):
            sent.append("app")

        async def receive():
            raise AssertionError("a refused request's body was read")

        async def send(message):
            sent.append(message)

        asyncio.run(RequireToken(app)(scope, receive, send))
        return sent

    return ask


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_token_opens(guarded, kind):
    assert guarded({"type": kind, "path": "/health", "headers": [(b"host", b"x"), GOOD]}) == ["app"]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", TOKEN.encode())],
        [(b"authorization", f"bearer {TOKEN}".encode())],
        [(b"authorization", f"Basic {TOKEN}".encode())],
        [(b"authorization", f"Bearer  {TOKEN}".encode())],
        [(b"authorization", f"Bearer {TOKEN} ".encode())],
        [(b"authorization", f"Bearer {TOKEN[:-1]}".encode())],
        [(b"authorization", f"Bearer {TOKEN}x".encode())],
        [(b"authorization", f"Bearer {TOKEN.upper()}".encode())],
        [(b"authorization", "Bearer tökén".encode("latin-1"))],
        [GOOD, GOOD],
        [GOOD, (b"authorization", b"Bearer other")],
        [(b"x-authorization", GOOD[1]), (b"cookie", GOOD[1])],
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_nothing_else_does(guarded, kind, headers):
    sent = guarded({"type": kind, "method": "OPTIONS", "path": "/", "headers": headers})
    if kind == "websocket":
        assert sent == [{"type": "websocket.close", "code": 1008}]
    else:
        assert sent[0]["status"] == 401
        assert TOKEN.encode() not in sent[1]["body"]


def test_startup_and_shutdown_pass(guarded):
    assert guarded({"type": "lifespan"}) == ["app"]


@pytest.mark.parametrize("token", [None, ""])
def test_no_server_without_a_token(monkeypatch, token):
    monkeypatch.delenv("LLMRL_SERVER_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("LLMRL_SERVER_TOKEN", token)
    with pytest.raises(RuntimeError, match="llmrl serve"):
        RequireToken(None)


def test_the_plugin_leaves_other_vllms_alone(monkeypatch):
    monkeypatch.delenv("LLMRL_VLLM", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    vllm_plugin.register()


def test_the_plugin_refuses_a_vllm_that_lacks_its_parts(monkeypatch):
    other = types.ModuleType("vllm")
    other.__version__, other.__path__ = "0.99.1", []
    for name in [n for n in sys.modules if n.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", other)
    monkeypatch.setenv("LLMRL_VLLM", "1")
    with pytest.raises(RuntimeError, match=r"0\.99\.1.*llmrl\[vllm\]"):
        vllm_plugin.register()


# What follows asks the real server.


def routes(server) -> set[str]:
    """Every path that the server names: in its schema, and in the list that it logs when it starts."""
    schema = httpx.get(f"{server.url}/openapi.json", headers=server.headers, timeout=30).json()["paths"]
    logged = re.findall(r"Route: (\S+), (?:Methods|Endpoint)", server.log.read_text())
    assert {"/collective_rpc", "/update_weights", "/pause", "/inference/v1/generate"} <= set(schema)
    assert {"/docs", "/openapi.json"} <= set(logged)
    return {*schema, *logged, "/metrics", "/", "/no-such-route", "/static/x", "/docs/oauth2-redirect"}


@pytest.mark.slow
def test_no_route_answers_without_the_token(vllm_server):
    token = vllm_server.token
    wrong = [
        [],
        [("Authorization", "Bearer wrong")],
        [("Authorization", f"bearer {token}")],
        [("Authorization", f"Bearer {token}"), ("Authorization", f"Bearer {token}")],
        [("Authorization", token)],
        [("Origin", "http://evil.example"), ("Access-Control-Request-Method", "POST")],
        [("X-Api-Key", token), ("Cookie", f"Authorization=Bearer {token}")],
    ]
    paths = sorted(routes(vllm_server))
    assert len(paths) > 40
    with httpx.Client(base_url=vllm_server.url, timeout=30) as client:
        for path in paths:
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
                for headers in wrong:
                    answer = client.request(method, path, headers=headers)
                    assert answer.status_code == 401, (method, path, headers)
                    assert "access-control-allow-origin" not in answer.headers
        for path in ("//health", "/v1/../health", "/HEALTH"):
            assert client.get(path).status_code == 401, path


@pytest.mark.slow
def test_every_route_takes_the_token(vllm_server):
    with httpx.Client(base_url=vllm_server.url, headers=vllm_server.headers, timeout=30) as client:
        for path in sorted(routes(vllm_server)):
            # A method that no route has: the answer comes from behind the token, and nothing happens.
            assert client.request("PROPFIND", path).status_code in (200, 404, 405, 307), path  # 200: metrics
        for path in ("/health", "/metrics", "/v1/models", "/openapi.json", "/docs", "/version", "/weight_info"):
            assert client.get(path).status_code == 200, path


@pytest.mark.slow
def test_websockets_are_refused_too(vllm_server):
    url = httpx.URL(vllm_server.url)
    lines = [
        "GET /v1/realtime HTTP/1.1", f"Host: {url.host}:{url.port}", "Connection: Upgrade", "Upgrade: websocket",
        "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", "",
    ]  # fmt: skip
    with socket.create_connection((url.host, url.port), timeout=30) as sock:
        sock.sendall("\r\n".join(lines).encode())
        status = sock.recv(4096).split(b"\r\n")[0]
    assert re.match(rb"HTTP/1.1 40[13] ", status), status


@pytest.mark.slow
def test_the_token_is_in_no_log_and_on_no_command_line(vllm_server):
    assert vllm_server.token not in vllm_server.log.read_text()
    assert vllm_server.token not in " ".join(vllm_server.command)
    lines = Path(f"/proc/{vllm_server.process.pid}/cmdline").read_text().split("\0")
    assert "vllm.entrypoints.openai.api_server" in lines  # it is the process that `llmrl serve` was
    assert vllm_server.token not in " ".join(lines)


@pytest.fixture
def client(vllm_server):
    from llmrl.rollout.vllm_client import VLLMServer

    server = VLLMServer(vllm_server.url, vllm_server.token)
    yield server
    server.close()


@pytest.fixture
def checkpoint(vllm_model, tmp_path):
    """The model's own tensors as two files, split in the middle of a layer; a sync of both changes nothing."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(vllm_model / "model.safetensors")
    names = sorted(tensors)
    cut = next(i for i, name in enumerate(names) if "layers.1.self_attn.q_proj.weight" in name) + 1
    save_file({name: tensors[name] for name in names[:cut]}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in names[cut:]}, tmp_path / "b.safetensors")
    return [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]


def greedy(client) -> list[int]:
    body = {
        "token_ids": [5, 6, 7, 8],
        "sampling_params": {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0},
    }
    return client.generate(body, 60)["choices"][0]["token_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "truncated", "no safetensors", "empty"])
def test_a_file_that_cannot_be_read_leaves_the_model_whole(client, checkpoint, damage):
    before, tokens, label = client.weights(), greedy(client), client.weight_label()
    bad = Path(checkpoint[1])
    content = bad.read_bytes()
    bad.write_bytes({"truncated": content[:-10], "no safetensors": b"{}" * 50, "empty": b""}.get(damage, b""))
    if damage == "missing":
        bad.unlink()
    client.pause()
    client.start_update()
    with pytest.raises(LLMRLError):
        client.update({"files": checkpoint})
    client.resume()
    assert client.weights() == before
    assert client.weight_label() == label
    assert greedy(client) == tokens


@pytest.mark.slow
def test_a_whole_update_cures_one_that_broke_off_in_a_layer(client, checkpoint, tmp_path):
    client.pause()
    client.start_update()
    client.update({"files": checkpoint})  # tests before this one may have left other weights
    client.finish_update("once")
    client.reset_prefix_cache()
    client.resume()
    before, tokens = client.weights(), greedy(client)
    client.pause()
    client.start_update()
    client.update({"files": checkpoint[:1]})
    with pytest.raises(LLMRLError):
        client.update({"files": [str(tmp_path / "missing.safetensors")]})
    client.start_update()
    for file in checkpoint:
        client.update({"files": [file]})
    client.finish_update("again")
    client.resume()
    assert client.weight_label() == "again"
    assert client.weights() == before
    assert greedy(client) == tokens


@pytest.mark.slow
def test_many_long_seeded_prompts_at_once(client):
    """With prompts cut into chunks, vLLM's CPU build dies of this."""
    from concurrent.futures import ThreadPoolExecutor

    def ask(i: int) -> int:
        sampling = {"n": 2, "max_tokens": 4, "seed": i, "ignore_eos": True, "logprobs": 0}
        body = {"token_ids": [(7 * i + j) % 300 + 3 for j in range(480)], "sampling_params": sampling}
        return len(client.generate(body, 120)["choices"])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [2] * 16


@pytest.mark.slow
def test_check_reports_the_server(vllm_server, monkeypatch, capsys):
    from llmrl.cli import serve

    monkeypatch.setenv("LLMRL_SERVER_TOKEN", vllm_server.token)
    assert serve.run(["--check", vllm_server.url]) == 0
    out = capsys.readouterr().out
    for part in ("qwen2, 2 layers of 64", "float32", "512", "disk", "rank 16", "tokens/s", "ms for one token"):
        assert part in out
    httpx.post(f"{vllm_server.url}/pause?mode=keep", headers=vllm_server.headers)
    assert serve.run(["--check", vllm_server.url]) == 1
    assert "paused" in capsys.readouterr().out
    httpx.post(f"{vllm_server.url}/resume", headers=vllm_server.headers)
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", "another-token-than-its-own")
    assert serve.run(["--check", vllm_server.url]) == 1
    assert "did not take the token" in capsys.readouterr().out


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_no_process_behind(second_vllm_server):
    second_vllm_server.crash()


def test_a_second_server_does_not_take_the_first_ones_token_file(tmp_path):
    code = "import sys; from pathlib import Path; from llmrl.rollout.vllm_server import claim; claim(Path(sys.argv[1])); print('mine', flush=True); input()"
    path = tmp_path / "tokens" / "token-8000"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == b"mine\n"
        with pytest.raises(ConfigError, match="another `llmrl serve`"):
            claim(path)
        first.communicate(b"\n")
    claim(path)  # the first has ended
