"""`llmrl serve`: what it refuses, how it writes the token, and what it starts."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from llmrl.cli import serve
from llmrl.errors import ConfigError
from llmrl.rollout import vllm_server
from llmrl.rollout.vllm_server import ServeOptions, prepare, write_token

TOKEN = "a-token-of-enough-characters"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, tmp_path):
    """As on a machine with vLLM's CPU build, and a home directory of its own."""
    monkeypatch.setattr(vllm_server, "_check_vllm", lambda: True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMRL_SERVER_TOKEN", raising=False)


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 2}))
    (path / "model.safetensors").write_bytes(b"")
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def plan(model, environ=None, **options):
    return prepare(ServeOptions(str(model), **{"port": free_port(), **options}), environ or {})


def value(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_command_and_environment(model):
    made = plan(model, {"VLLM_API_KEY": "other", "VLLM_PLUGINS": "mine"}, max_lora_rank=5, max_model_len=99)
    assert value(made.command, "--model") == str(model)
    assert value(made.command, "--middleware") == "llmrl.rollout.vllm_auth.RequireToken"
    assert value(made.command, "--logprobs-mode") == "processed_logprobs"
    assert value(made.command, "--host") == "127.0.0.1"
    assert value(made.command, "--max-lora-rank") == "8"  # vLLM has slots of 1, 8, 16, ...
    assert value(made.command, "--max-model-len") == "99"
    assert value(made.command, "--dtype") == "float32"
    assert {"--enforce-eager", "--no-enable-chunked-prefill"} <= set(made.command)
    assert "VLLM_API_KEY" not in made.environment
    assert made.environment["VLLM_PLUGINS"] == "mine,llmrl"
    assert made.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert int(made.environment["VLLM_CPU_KVCACHE_SPACE"]) >= 1
    assert len(made.environment["LLMRL_SERVER_TOKEN"]) >= 40
    assert made.environment["LLMRL_SERVER_TOKEN"] not in " ".join(made.command)


def test_what_the_user_sets_is_left(model):
    arguments = ("--no-enforce-eager", "--enable_chunked_prefill", "--kv-cache-memory-bytes", "1000000")
    made = plan(model, {"HF_HUB_OFFLINE": "0"}, dtype="bfloat16", vllm_args=arguments)
    assert made.command[-len(arguments) :] == list(arguments)
    assert not {"--enforce-eager", "--no-enable-chunked-prefill"} & set(made.command)
    assert "VLLM_CPU_KVCACHE_SPACE" not in made.environment  # it would win over the argument
    assert made.environment["HF_HUB_OFFLINE"] == "0"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in made.environment


def test_on_gpus(model, monkeypatch):
    monkeypatch.setattr(vllm_server, "_check_vllm", lambda: False)
    (model / "config.json").write_text(json.dumps({"hidden_size": 48, "num_attention_heads": 4}))
    made = plan(model, transfer="nccl", tensor_parallel_size=2, data_parallel_size=3)
    assert json.loads(value(made.command, "--weight-transfer-config")) == {"backend": "nccl"}
    assert (value(made.command, "--tensor-parallel-size"), value(made.command, "--data-parallel-size")) == ("2", "3")
    assert not {"--dtype", "--enforce-eager", "--no-enable-chunked-prefill"} & set(made.command)
    assert "VLLM_CPU_KVCACHE_SPACE" not in made.environment


@pytest.mark.parametrize(
    "argument",
    ["--middleware", "--middleware=x.Y", "--mi", "--api-key", "--api_key", "--API-KEY", "--logprobs-mode=raw_logprobs", "--worker-ext",
     "--weight-transfer-config.backend", "--config", "--uds", "--no-enable-scale-out", "--generation-config", "--host=0.0.0.0", "--port",
     "--model", "-tp", "--no-enable-lora"],
)  # fmt: skip
def test_arguments_that_are_not_the_users(model, argument):
    with pytest.raises(ConfigError, match=argument.split(".")[0]):
        plan(model, vllm_args=("--seed", "1", argument, "value"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 0}, "1 to 65535"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size 0"),
        ({"max_model_len": -1}, "--max-model-len -1"),
        ({"max_lora_rank": 513}, "up to rank 512"),
        ({"transfer": "nccl"}, "CPU build"),
        ({"host": ""}, "0.0.0.0"),
        ({"vllm_args": ("x",)}, "begin with --"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ConfigError, match=message):
        plan(model, **options)


def test_models_that_cannot_be_served(model, tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        plan(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a file"):
        plan(model / "config.json")
    (model / "config.json").write_text(json.dumps({"hidden_size": 48, "num_attention_heads": 4}))
    with pytest.raises(ConfigError, match="heads of 12 elements"):
        plan(model)
    (model / "config.json").write_text(json.dumps({"text_config": {"head_dim": 80}}))
    with pytest.raises(ConfigError, match="heads of 80 elements"):
        plan(model)
    (model / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json can't be read"):
        plan(model)
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        plan(model)
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="llmrl merge"):
        plan(model)


def test_a_name_on_the_hub_is_passed_on():
    made = plan("Qwen/Qwen2.5-0.5B")
    assert value(made.command, "--model") == "Qwen/Qwen2.5-0.5B"
    assert "HF_HUB_OFFLINE" not in made.environment


def test_a_port_that_is_taken(model):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(ConfigError, match="another --port"):
            plan(model, port=sock.getsockname()[1])


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_for_others_needs_a_token_that_was_given(model, tmp_path, host):
    with pytest.raises(ConfigError, match="LLMRL_SERVER_TOKEN"):
        plan(model, host=host)
    with pytest.raises(ConfigError, match="LLMRL_SERVER_TOKEN"):
        plan(model, host=host, token_file=str(tmp_path / "not-there-yet"))
    if host == "0.0.0.0":
        assert plan(model, {"LLMRL_SERVER_TOKEN": TOKEN}, host=host).url.startswith("http://0.0.0.0:")


def test_where_the_token_comes_from(model, tmp_path):
    new = plan(model, port=(port := free_port()))
    assert new.token_written == Path(os.environ["HOME"]) / ".llmrl" / f"token-{port}"
    assert new.environment["LLMRL_SERVER_TOKEN"] != plan(model).environment["LLMRL_SERVER_TOKEN"]

    given = plan(model, {"LLMRL_SERVER_TOKEN": TOKEN})
    assert (given.environment["LLMRL_SERVER_TOKEN"], given.token_written) == (TOKEN, None)

    file = tmp_path / "token"
    assert plan(model, token_file=str(file)).token_written == file
    write_token(file, TOKEN)
    kept = plan(model, token_file=str(file))
    assert (kept.environment["LLMRL_SERVER_TOKEN"], kept.token_written) == (TOKEN, None)
    with pytest.raises(ConfigError, match="unset one"):
        plan(model, {"LLMRL_SERVER_TOKEN": TOKEN}, token_file=str(file))
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        plan(model, token_file=str(file))


@pytest.mark.parametrize("weak", ["short", "with spaces in between them", "ümlauts-are-not-for-headers"])
def test_weak_tokens(model, weak):
    with pytest.raises(ConfigError, match="at least 16"):
        plan(model, {"LLMRL_SERVER_TOKEN": weak})


def test_nobody_else_can_read_the_token_at_any_time(tmp_path, monkeypatch):
    seen = []
    replace = Path.replace

    def spy(self, target):
        seen.append((stat.S_IMODE(self.stat().st_mode), self.read_text()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", spy)
    path = tmp_path / "private" / "token"
    before = os.umask(0)
    try:
        write_token(path, "first")
        write_token(path, "second")
    finally:
        os.umask(before)
    assert seen == [(0o600, "first\n"), (0o600, "second\n")]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_token_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--token-file"):
        write_token(tmp_path / "file" / "token", TOKEN)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model M"),
        (["--model", "m", "--check", "http://x:1"], "--model M"),
        (["--check", "http://x:1", "--port", "3"], "--port is for starting"),
        (["--model", "m", "--gpu-memory-utilization", "0.5"], "come after --"),
    ],
)
def test_command_lines_that_make_no_sense(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        serve.run(argv)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_launch_becomes_the_server(model, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    port = free_port()
    serve.run(["--model", str(model), "--port", str(port), "--dtype", "bfloat16", "--", "--seed", "7"])
    ((program, command, environment),) = calls
    assert command[0] == program
    assert command[-2:] == ["--seed", "7"]
    assert value(command, "--dtype") == "bfloat16"
    token = environment["LLMRL_SERVER_TOKEN"]
    assert (Path(os.environ["HOME"]) / ".llmrl" / f"token-{port}").read_text().strip() == token
    assert token not in capsys.readouterr().out
