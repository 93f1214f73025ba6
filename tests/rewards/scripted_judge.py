"""A chat completions server in a thread whose replies a test scripts."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Ask:
    """One request, with what stands between its markers."""

    def __init__(self, body: dict[str, Any], headers: Any) -> None:
        self.body, self.headers = body, headers
        self.system, self.user = body["messages"][0]["content"], body["messages"][1]["content"]
        self.last = body["messages"][-1]["content"]
        self.id = re.search(r'"id": "(\w+)"', self.system)[1]
        self.nonce = re.findall(r"data of request (\w+), all of it", self.user)[-1]
        self.constrained = "response_format" in body
        self.repeated = len(body["messages"]) > 2

    def part(self, name: str) -> str:
        """What the real markers enclose."""
        inside = re.search(rf"<{name} {self.nonce}>\n(.*)\n</{name} {self.nonce}>", self.user, re.DOTALL)
        return "" if inside is None else inside[1]

    @property
    def criteria(self) -> list[str]:
        return re.findall(r"^- ([\w-]+) \(", self.system, re.MULTILINE)

    def verdict(self, *values: float, **extra: Any) -> str:
        return json.dumps({"id": self.id, "scores": dict(zip(self.criteria, values)), **extra})

    def winner(self, winner: str) -> str:
        return json.dumps({"id": self.id, "winner": winner})


class Answer:
    """Anything but a plain reply of 200."""

    def __init__(self, text="", *, status=200, headers=None, delay=0.0, raw=False, drop=False) -> None:
        self.text, self.status, self.headers, self.delay = text, status, headers or {}, delay
        self.raw, self.drop = raw, drop


class ScriptedJudge:
    """`script(ask)` gives the reply: its text, or an `Answer`. `asks` are the requests so far, `most` how many ran at once."""

    def __init__(self, script: Callable[[Ask], Any]) -> None:
        self.script, self.asks, self.times = script, [], []
        self.now = self.most = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"judge": self})
        self.server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, body: dict[str, Any], headers: Any) -> Answer:
        ask = Ask(body, headers)
        with self.lock:
            self.asks.append(ask)
            self.times.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            found = self.script(ask)
            found = found if isinstance(found, Answer) else Answer(found)
            time.sleep(found.delay)
            return found
        finally:
            with self.lock:
                self.now -= 1


class _Server(ThreadingHTTPServer):
    # With the standard five, connections that come at once are turned away while both cores are busy, and the client's retry counts.
    request_queue_size = 128
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: ScriptedJudge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        found = self.judge.answer(body, self.headers)
        if found.drop:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        message = {"choices": [{"message": {"role": "assistant", "content": found.text}, "finish_reason": "stop"}],
                   "usage": {"prompt_tokens": 100, "completion_tokens": 20}}  # fmt: skip
        text = found.text if found.raw or found.status != 200 else json.dumps(message)
        data = text.encode()
        try:
            self.send_response(found.status if self.path == "/v1/chat/completions" else 404)
            for name, value in {**found.headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client gave up

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve(script: Callable[[Ask], Any]):
    judge = ScriptedJudge(script)
    threading.Thread(target=judge.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield judge
    finally:
        judge.server.shutdown()
        judge.server.server_close()


@pytest.fixture
def judge():
    """A judge whose `script` the test sets."""
    with serve(lambda ask: ask.verdict(*[1] * len(ask.criteria))) as server:
        yield server
