"""A small HTTP server that speaks the protocol of the generation server, with a real tiny model inside and faults to order.

    with FakeVLLM(model_dir) as fake:
        fake.fail("/inference/v1/generate", "500")               # the next request; times=None: all of them
        fake.weight_fault = "drop_update"                        # answers 200, loads nothing

Route faults (`fail`): "500", "503", "401", "drop" (the connection closes without an answer), "cut" (closes in the middle of the body),
"hang" (no answer for `seconds`), "late" (answers after `seconds`), "malformed", "not_an_object"; on generate also "fewer_tokens",
"fewer_logprobs", "no_logprobs", "missing_choice", "same_index", "wrong_finish", "abort", "bad_token", "other_token", "nan",
"positive", "no_versions", "short_versions", "too_many_tokens", "empty", "die" (the whole server, after two tokens).
Weight faults (`weight_fault`): "drop_update", "lose_tensor" (one of them), "half_update" (the second half of the tensors),
"restore_stale" (the weights before the update come back at the next request), "stale_prefix" (cached prompts survive salt and reset),
"wrong_label" (completions name another version). `become(model_dir)` puts another model in.
"""

from __future__ import annotations

import copy
import json
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from llmrl.rollout.fingerprint import Fingerprint, fingerprint
from llmrl.rollout.sampling import draw
from llmrl.types import Sampling

GENERATE = "/inference/v1/generate"


class _Hangup(Exception):
    """The client has gone, or the server dies: there is nobody to answer."""


class _Answer(Exception):
    """Ends a request with this status and object."""

    def __init__(self, status: int, content: Any) -> None:
        self.status, self.content = status, content


@dataclass
class _Fault:
    kind: str
    times: int | None
    seconds: float


class FakeVLLM:
    """Started at once, on a free port of 127.0.0.1. `requests` lists (route, body); `peak` is the most generate requests at once."""

    def __init__(
        self, model_dir: Path, *, token: str = "secret", max_model_len: int = 512, max_lora_rank: int = 16
    ) -> None:
        self.model_dir, self.token, self.max_model_len = Path(model_dir), token, max_model_len
        self.max_lora_rank = max_lora_rank
        self.weight_fault: str | None = None
        self.overrides: dict[str, Any] = {}  # of what it says when it describes itself
        self.seconds_per_token = 0.0
        self.on_token: Callable[[int], None] | None = None  # called with the place of the token about to be sampled
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.faults: dict[str, deque[_Fault]] = {}
        self.peak = self.aborted = 0
        self._port = 0
        self._lock = threading.RLock()  # the model
        self.start()

    # -- life

    def start(self) -> None:
        """Listens, on the port that it had before if it had one, with the weights of its directory and the label "default"."""
        self.become(self.model_dir)
        self.label, self._updating, self._broken = "default", False, False
        self.received = Fingerprint()
        self.adapters: dict[str, Any] = {}
        self._prefixes: dict[Any, Any] = {}
        self._stale: dict[str, torch.Tensor] | None = None
        self._resumed = threading.Event()
        self._resumed.set()
        self.in_flight = 0
        self._dead, self._draining = threading.Event(), threading.Event()
        self._busy: set[socket.socket] = set()
        self._sockets: set[socket.socket] = set()
        self._http = _Http(("127.0.0.1", self._port), self)
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        """Closes its port and all connections, as a process that dies does."""
        if self._dead.is_set():
            return
        self._dead.set()
        self._http.shutdown()
        self._http.server_close()
        for sock in list(self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    stop = kill

    def drain(self) -> None:
        """Closes its port and never answers requests in flight, whose connections stay open: the real one does so after SIGTERM."""
        self._draining.set()
        self._http.shutdown()
        self._http.server_close()
        for sock in self._sockets - self._busy:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def hold(self, connection: socket.socket) -> None:
        """Returns at once, unless it drains."""
        if self._draining.is_set():
            self._sleep(float("inf"), connection)

    def restart(self) -> None:
        self.kill()
        self.start()

    def become(self, model_dir: Path) -> None:
        """Holds the model of another directory from now on, and says nothing about it."""
        from transformers import AutoModelForCausalLM

        with self._lock:
            self.model = AutoModelForCausalLM.from_pretrained(model_dir).float().eval()

    def __enter__(self) -> FakeVLLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def fail(self, route: str, kind: str, *, times: int | None = 1, seconds: float = 0.0) -> None:
        """The next `times` requests to the route fail so (all of them for None), after the faults already ordered."""
        self.faults.setdefault(route, deque()).append(_Fault(kind, times, seconds))

    def count(self, route: str) -> int:
        return sum(r == route for r, _ in self.requests)

    # -- requests

    def answer(self, method: str, path: str, body: dict[str, Any], connection: socket.socket) -> tuple[int, Any, str]:
        """(status, content, what to do to the answer's bytes) of a request that brought the right token."""
        route, _, query = path.partition("?")
        self.requests.append((route, body))
        fault = self._fault(route)
        kind = fault.kind if fault else ""
        if kind in ("500", "503", "401"):
            return int(kind), {"error": {"message": f"injected {kind}"}}, ""
        if kind == "drop":
            raise _Hangup
        if fault and kind in ("hang", "late"):
            self._sleep(fault.seconds, connection)
            if kind == "hang":
                raise _Hangup
        if (method, route) == ("POST", GENERATE):
            content = self._generate(body, kind, connection)
        else:
            handler = getattr(self, f"_{method.lower()}_{route.strip('/').replace('/', '_')}", None)
            if handler is None:
                return 404, {"detail": "Not Found"}, ""
            content = handler(body, query) or {}
        return 200, content, kind if kind in ("cut", "malformed", "not_an_object") else ""

    def _fault(self, route: str) -> _Fault | None:
        with self._lock:
            queue = self.faults.get(route)
            if not queue:
                return None
            fault = queue[0]
            if fault.times is not None:
                fault.times -= 1
                if fault.times == 0:
                    queue.popleft()
            return fault

    def _sleep(self, seconds: float, connection: socket.socket) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._check_alive(connection)
            time.sleep(0.005)

    def _check_alive(self, connection: socket.socket) -> None:
        if self._dead.is_set():
            raise _Hangup
        readable, _, _ = select.select([connection], [], [], 0)
        if readable and not connection.recv(1, socket.MSG_PEEK):
            self.aborted += 1
            raise _Hangup

    def _get_health(self, body: Any, query: str) -> None:
        pass

    def _get_weight_info(self, body: Any, query: str) -> Any:
        return {"weight_version": self.label}

    def _get_get_world_size(self, body: Any, query: str) -> Any:
        return {"world_size": 1}

    def _post_update_weight_version(self, body: Any, query: str) -> Any:
        self.label = body["new_version"]
        return {"success": True, "new_version": self.label}

    def _post_pause(self, body: Any, query: str) -> Any:
        assert query == "mode=keep", "only `keep` is implemented"
        self._resumed.clear()
        with self._lock:  # a token that is being computed is finished first
            return {"status": "paused"}

    def _post_resume(self, body: Any, query: str) -> Any:
        self._resumed.set()
        return {"status": "resumed"}

    def _post_reset_prefix_cache(self, body: Any, query: str) -> Any:
        if self.in_flight:
            return {"success": False}
        if self.weight_fault != "stale_prefix":
            self._prefixes.clear()
        return {"success": True}

    def _post_collective_rpc(self, body: Any, query: str) -> Any:
        config = self.model.config
        with self._lock:
            if body["method"] == "llmrl_weights":
                return {"results": [fingerprint(self.model.parameters()).to_json()]}
            if body["method"] == "llmrl_received":
                return {"results": [self.received.to_json()]}
        if body["method"] != "llmrl_describe" or "plain_vllm" in self.overrides:
            raise _Answer(500, {"error": {"message": f"AttributeError: no attribute {body['method']!r}"}})
        described = {k: getattr(config, k) for k in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")}
        described |= {"dtype": "float32", "max_model_len": self.max_model_len, "quantization": None}
        described |= {"logprobs_mode": "processed_logprobs", "weight_transfer": "disk"}
        described |= {f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "data")}
        return {"results": [described | {"max_lora_rank": self.max_lora_rank} | self.overrides]}

    # -- weights

    def _post_init_weight_transfer_engine(self, body: Any, query: str) -> Any:
        return {"message": "Weight transfer initialized"}

    def _post_shutdown_weight_transfer_engine(self, body: Any, query: str) -> Any:
        return {"message": "Weight transfer shut down"}

    def _post_start_weight_update(self, body: Any, query: str) -> Any:
        with self._lock:
            self._updating, self._broken = True, False
            self._before = {k: v.clone() for k, v in self.model.state_dict().items()}
            self._lost, self.received = False, Fingerprint()
        return {"message": "Weight update started"}

    def _post_update_weights(self, body: Any, query: str) -> Any:
        if not self._updating:
            raise _Answer(500, {"error": {"message": "no weight update was started"}})
        with self._lock, torch.no_grad():
            state = self.model.state_dict()
            for path in body["update_info"]["files"]:
                try:
                    tensors = list(load_file(path).items())
                    if self.weight_fault == "drop_update":
                        tensors = []
                    elif self.weight_fault == "half_update":
                        tensors = tensors[: len(tensors) // 2]
                    elif self.weight_fault == "lose_tensor" and not self._lost:
                        tensors, self._lost = tensors[:-1], True
                    self.received += fingerprint(t for _, t in tensors)
                    for name, tensor in tensors:
                        if state[name].shape != tensor.shape:
                            raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
                        state[name].copy_(tensor)
                except Exception as error:
                    self._broken = True
                    raise _Answer(500, {"error": {"message": f"{type(error).__name__}: {error}"}}) from error
        return {"message": "Weights updated"}

    def _post_finish_weight_update(self, body: Any, query: str) -> Any:
        self._updating = False
        self.label = body["weight_version"] or self.label
        if self.weight_fault == "restore_stale":
            self._stale = self._before
        return {"message": "Weight update finished"}

    def _post_v1_load_lora_adapter(self, body: Any, query: str) -> Any:
        from peft import PeftModel

        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            raise _Answer(400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}})
        try:
            rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
            if rank > self.max_lora_rank:
                raise ValueError(f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}")
            with self._lock:
                self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.model), path).eval()
        except (OSError, ValueError) as error:
            raise _Answer(404, {"error": {"message": str(error)}}) from error
        return f"Success: LoRA adapter '{name}' added successfully."

    def _post_v1_unload_lora_adapter(self, body: Any, query: str) -> Any:
        if self.adapters.pop(body["lora_name"], None) is None:
            raise _Answer(404, {"error": {"message": f"The lora adapter '{body['lora_name']}' cannot be found."}})
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    # -- generation

    def _generate(self, body: dict[str, Any], fault: str, connection: socket.socket) -> Any:
        params = body["sampling_params"]
        n, limit = params.get("n", 1), params["max_tokens"]
        name = body.get("model")
        if len(body["token_ids"]) + limit > self.max_model_len:
            raise _Answer(400, {"error": {"message": f"maximum context length is {self.max_model_len} tokens"}})
        if n > 1 and params["temperature"] == 0:
            raise _Answer(400, {"error": {"message": f"n must be 1 when using greedy sampling, got {n}."}})
        if name is not None and name not in self.adapters:
            raise _Answer(404, {"error": {"message": f"The model `{name}` does not exist."}})
        with self._lock:
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            if self._stale is not None and self._resumed.is_set():
                self.model.load_state_dict(self._stale)
                self._stale = None
        try:
            rows = self._sample(body, params, n, limit, fault, connection)
        finally:
            with self._lock:
                self.in_flight -= 1
        choices = [self._choice(i, *row) for i, row in enumerate(rows)]
        _spoil(choices, fault, limit, self.model.config.vocab_size)
        return {"request_id": "fake", "model": name or str(self.model_dir), "choices": choices}

    def _sample(
        self, body: dict[str, Any], params: dict[str, Any], n: int, limit: int, fault: str, connection: socket.socket
    ) -> list[tuple[list[int], list[float], list[str], str]]:
        ids, stops = tuple(body["token_ids"]), set(params.get("stop_token_ids") or ())
        sampling = Sampling(
            limit, params["temperature"], params.get("top_p", 1.0), params.get("top_k", 0), params.get("min_p", 0.0)
        )
        uniforms = [np.random.default_rng(params["seed"] + i).random(limit) for i in range(n)]
        rows: list[tuple[list[int], list[float], list[str]]] = [([], [], []) for _ in range(n)]
        finish = [""] * n
        newest, cache = torch.tensor([ids[-1:]] * n), None
        for t in range(limit):
            if self.on_token is not None:
                self.on_token(t)
            if fault == "die" and t == 2:
                self.kill()
            time.sleep(self.seconds_per_token)
            with self._when_resumed(connection), torch.no_grad():
                if self._updating or self._broken:  # the real one dies, too, with half of its weights
                    self.kill()
                    raise _Hangup
                model = self.adapters[body["model"]] if body.get("model") else self.model
                label = f"{self.label}-not" if self.weight_fault == "wrong_label" else self.label
                if cache is None and len(ids) > 1:
                    cache = self._prefix(model, ids[:-1], body.get("cache_salt"), body.get("model"), n)
                out = model(input_ids=newest, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            u = torch.tensor([row[t] for row in uniforms], dtype=torch.float64)
            tokens, logprobs = draw(out.logits[:, -1], sampling, u)
            newest = tokens[:, None]
            for i, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
                if not finish[i]:
                    for values, value in zip(rows[i], (token, logprob, label)):
                        values.append(value)  # type: ignore[arg-type]
                    finish[i] = "stop" if token in stops else "length" if t == limit - 1 else ""
            if all(finish):
                break
        return [(*row, reason) for row, reason in zip(rows, finish)]

    @contextmanager
    def _when_resumed(self, connection: socket.socket) -> Iterator[None]:
        """Holds the model, which is not paused then."""
        while True:
            self._check_alive(connection)
            if self._resumed.wait(0.005):
                with self._lock:
                    if self._resumed.is_set():
                        yield
                        return

    def _prefix(self, model: Any, ids: tuple[int, ...], salt: str | None, name: str | None, n: int) -> Any:
        """Keys and values of all prompt tokens but the last, [n, ...] of each; from the cache when they are in it."""
        key = ids if self.weight_fault == "stale_prefix" else (salt, name, ids)
        if key not in self._prefixes:
            out = model(input_ids=torch.tensor([ids]), use_cache=True)
            self._prefixes[key] = out.past_key_values
        cache = copy.deepcopy(self._prefixes[key])
        cache.batch_repeat_interleave(n)
        return cache

    @staticmethod
    def _choice(index: int, ids: list[int], logprobs: list[float], labels: list[str], reason: str) -> dict[str, Any]:
        spans: list[dict[str, Any]] = []
        for t, label in enumerate(labels):
            if spans and spans[-1]["version"] == label:
                spans[-1]["end"] = t + 1
            else:
                spans.append({"version": label, "start": t, "end": t + 1})
        content = [{"token_id": i, "logprob": p, "rank": None, "top_logprobs": []} for i, p in zip(ids, logprobs)]
        return {
            "index": index, "finish_reason": reason, "stop_reason": ids[-1] if reason == "stop" else None, "token_ids": ids,
            "logprobs": {"content": content}, "weight_versions": spans,
        }  # fmt: skip


def _spoil(choices: list[dict[str, Any]], fault: str, limit: int, vocab: int) -> None:
    """Breaks the promise that `fault` names, in the first choice."""
    first = choices[0]
    content = first["logprobs"]["content"]
    if fault == "fewer_tokens":
        first["token_ids"] = first["token_ids"][:-1]
        del content[-1]
        first["finish_reason"] = "length"
    elif fault == "too_many_tokens":
        first["token_ids"] = [*first["token_ids"], *[1] * limit]
        content += [dict(content[0], token_id=1) for _ in range(limit)]
    elif fault == "empty":
        first["token_ids"], first["logprobs"] = [], {"content": []}
    elif fault == "fewer_logprobs":
        del content[-1]
    elif fault == "no_logprobs":
        first["logprobs"] = None
    elif fault == "missing_choice":
        del choices[-1]
    elif fault == "same_index":
        choices[-1]["index"] = choices[0]["index"] if len(choices) > 1 else 1
    elif fault == "wrong_finish":
        first["finish_reason"] = "length" if first["finish_reason"] == "stop" else "stop"
    elif fault == "abort":
        first["finish_reason"] = "abort"
    elif fault == "bad_token":
        first["token_ids"][0] = content[0]["token_id"] = vocab
    elif fault == "other_token":
        content[0]["token_id"] = (content[0]["token_id"] + 1) % vocab
    elif fault == "nan":
        content[0]["logprob"] = float("nan")
    elif fault == "positive":
        content[0]["logprob"] = 0.5
    elif fault == "no_versions":
        first["weight_versions"] = None
    elif fault == "short_versions":
        first["weight_versions"][-1]["end"] -= 1


class _Http(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def __init__(self, address: tuple[str, int], fake: FakeVLLM) -> None:
        self.fake = fake
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # connections that break are what it is for


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    def setup(self) -> None:
        super().setup()
        self.server.fake._sockets.add(self.connection)

    def finish(self) -> None:
        self.server.fake._sockets.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        fake = self.server.fake
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {fake.token}":
            return self._send(401, {"error": "this server needs the header Authorization: Bearer TOKEN"}, "")
        fake._busy.add(self.connection)
        try:
            answer = fake.answer(self.command, self.path, json.loads(body) if body else {}, self.connection)
            fake.hold(self.connection)
            self._send(*answer)
        except _Answer as answer:
            self._send(answer.status, answer.content, "")
        except (_Hangup, OSError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            fake._busy.discard(self.connection)

    def _send(self, status: int, content: Any, spoil: str) -> None:
        data = json.dumps([content] if spoil == "not_an_object" else content).encode()
        if spoil == "malformed":
            data = data[: len(data) // 2]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if spoil == "cut" else data)
        if spoil == "cut":
            raise _Hangup
