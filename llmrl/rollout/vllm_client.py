"""Talks to one generation server: stock vLLM, as `llmrl serve` starts it. Nothing here knows about groups, retries or versions."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

import httpx

from llmrl.errors import ConfigError, RolloutError
from llmrl.rollout.fingerprint import Fingerprint
from llmrl.rollout.vllm_auth import TOKEN_VARIABLE, token_path

UPDATE_TIMEOUT = 1800.0
"""Seconds for one call that moves weights, which may read gigabytes from a slow disk."""
_KEEPALIVE = 2.0
"""Seconds that an idle connection is kept: less than the server's 5, so that none is used just as the server closes it."""
_EXCERPT = 300
"""Characters of a server's answer that an error message quotes."""


class ServerError(RolloutError):
    """A generation server failed; `server` is its URL."""

    def __init__(self, server: str, message: str) -> None:
        super().__init__(f"{server}: {message}")
        self.server = server


class ServerGone(ServerError):
    """The connection could not be made, was lost or timed out: the server may come back, another may take the request."""


class ServerSilent(ServerGone):
    """No answer in time: the server may be busy."""


class ServerRefused(ServerError):
    """The server did not take the token."""


class ServerFault(ServerError):
    """The server answered with an error (`status` then holds its number), or with something that breaks its promise."""

    def __init__(self, server: str, message: str, status: int | None = None) -> None:
        super().__init__(server, message)
        self.status = status


def find_token(url: str, token_file: str | None) -> str:
    """The token of the server at `url`: $LLMRL_SERVER_TOKEN, else what `token_file` holds, else, for a server on this machine (or at
    this end of a tunnel), what `llmrl serve` wrote here: a server for other machines never gets a token that was made here.

    Raises ConfigError, with the places that were looked at, when there is none.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token:
        return token
    if not token_file and not is_loopback(url):
        raise ConfigError(
            f"No token for the server {url}: ${TOKEN_VARIABLE} is not set. Set it to the server's token, or write the token to a file and "
            "name that in rollout.token_file."
        )
    path = Path(token_file).expanduser() if token_file else token_path(_port(url))
    try:
        token = path.read_text().strip()
    except OSError as error:
        raise ConfigError(
            f"No token for the server {url}: ${TOKEN_VARIABLE} is not set and {path} can't be read ({error.strerror}). `llmrl serve` writes "
            "its token to ~/.llmrl/token-PORT, or to its --token-file; on another machine, copy that file and name it in rollout.token_file."
        ) from error
    if not token:
        raise ConfigError(f"No token for the server {url}: {path} is empty. Copy it again from the server's machine.")
    return token


def is_loopback(url: str) -> bool:
    """Whether the server is reached through this machine alone."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(url: str) -> int:
    parts = urlsplit(url)
    try:
        return parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a server's URL ({error}); write http://host:port.") from error


class VLLMServer:
    """One server at `url`. Every method raises ServerGone, ServerRefused or ServerFault; threads may share it.

    timeout: seconds for a call that neither generates nor moves weights. connections: calls at once; more wait for their turn.
    renew: gives the token that is to be used when the server refuses this one, since a server that is started again may have a new one.
    Proxies and ~/.netrc of the environment are not used: they would see, or replace, the token.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout: float = 60.0,
        connections: int = 100,
        renew: Callable[[], str] | None = None,
    ) -> None:
        _port(url)
        self._renew = renew
        self.url, self._timeout = url.rstrip("/"), timeout
        self._calls, self._count = 0, threading.Lock()
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"},
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=_KEEPALIVE),
            trust_env=False,
        )

    def __repr__(self) -> str:
        return f"VLLMServer({self.url!r})"

    def is_up(self, timeout: float = 2.0) -> bool:
        """Whether `check` passes within `timeout` seconds; ServerRefused passes through, since waiting can't cure it."""
        try:
            self.check(timeout)
        except (ServerGone, ServerFault):
            return False
        return True

    def check(self, timeout: float = 2.0) -> None:
        """Asks /health, which a busy server answers, too."""
        self._send("GET", "/health", None, timeout)

    @property
    def is_asked(self) -> bool:
        """Whether calls other than /health are in flight."""
        return self._calls > 0

    def hang_up(self) -> None:
        """Ends the calls in flight, which fail with ServerGone at once; later calls connect anew."""
        with self._count:
            sockets = list(self._sockets)
        for sock in sockets:
            with suppress(OSError):  # closed meanwhile
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it; closing it would not

    def describe(self) -> dict[str, Any]:
        """What the first worker says about its model and settings (`WeightProof.llmrl_describe`)."""
        try:
            return self._rpc("llmrl_describe")[0]
        except ServerFault as error:
            if error.status is None:
                raise
            raise ServerFault(
                self.url,
                f"is a server, but not one that `llmrl serve` started: it can't describe its weights (HTTP {error.status}). "
                "Start it with `llmrl serve --model M`, which opens the routes that training needs.",
                error.status,
            ) from error

    def generate(self, body: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """POST /inference/v1/generate: token ids in and out; unchecked but for being a JSON object.

        When it gives up after `timeout` seconds the connection is closed, which makes vLLM abort the request.
        """
        return self._json("POST", "/inference/v1/generate", body, timeout)

    def models(self) -> list[dict[str, Any]]:
        """What it serves, the model first and then adapters: id, root (directory or hub id), max_model_len. Any vLLM server answers."""
        served = self._field(self._json("GET", "/v1/models"), "data")
        if not isinstance(served, list) or not served or not all(isinstance(m, dict) and "id" in m for m in served):
            raise ServerFault(self.url, f"/v1/models answered with {str(served)[:_EXCERPT]}, not with a list of models")
        return served

    def vllm_version(self) -> str:
        return str(self._field(self._json("GET", "/version"), "version"))

    def tokenise(self, model: str, text: str) -> list[int]:
        """The ids of a text by the server's own tokenizer, without special tokens before it."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        return list(self._field(self._json("POST", "/tokenize", body), "tokens"))

    def complete(self, body: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """POST /v1/completions, which any vLLM server answers; unchecked but for being a JSON object."""
        return self._json("POST", "/v1/completions", body, timeout)

    def abort(self, request_ids: Sequence[str], timeout: float = 2.0) -> None:
        """Ends requests in flight, by the `request_id` in their bodies; they are then answered with what they have."""
        # vLLM puts the prefix before the ids that it is given.
        body = {"request_ids": [f"generate-tokens-{i}" for i in request_ids]}
        self._send("POST", "/inference/v1/abort_requests", body, timeout)

    def weights(self) -> list[Fingerprint]:
        """The fingerprint of the parameters in memory, one a worker."""
        return self._fingerprints(self._rpc("llmrl_weights"))

    def received(self) -> list[Fingerprint]:
        """The fingerprint of the tensors read in the last update, one a worker; empty where the transfer does not count them."""
        return self._fingerprints([r for r in self._rpc("llmrl_received") if r])

    def _fingerprints(self, results: list[dict[str, Any]]) -> list[Fingerprint]:
        try:
            return [Fingerprint.from_json(r) for r in results]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerFault(
                self.url, f"answered with fingerprints that can't be read: {str(results)[:_EXCERPT]}"
            ) from error

    def weight_label(self) -> str:
        """The label of the weights that it holds; "default" for those that it was started with."""
        return str(self._field(self._json("GET", "/weight_info"), "weight_version"))

    def set_weight_label(self, label: str) -> None:
        self._json("POST", "/update_weight_version", {"new_version": label})

    def pause(self) -> None:
        """Freezes requests in flight until `resume`; new ones wait."""
        self._json("POST", "/pause?mode=keep")

    def is_paused(self) -> bool:
        return bool(self._field(self._json("GET", "/is_paused"), "is_paused"))

    def resume(self) -> None:
        self._json("POST", "/resume")

    def reset_prefix_cache(self) -> bool:
        """False when blocks are held, by requests that are frozen for instance; nothing is then dropped."""
        return bool(self._field(self._json("POST", "/reset_prefix_cache"), "success"))

    def init_transfer(self, info: Mapping[str, Any]) -> None:
        self._json("POST", "/init_weight_transfer_engine", {"init_info": info}, UPDATE_TIMEOUT)

    def shutdown_transfer(self) -> None:
        self._json("POST", "/shutdown_weight_transfer_engine")

    def start_update(self) -> None:
        """Makes the server ready for new weights; may be called again after a failed update."""
        self._json("POST", "/start_weight_update", None, UPDATE_TIMEOUT)

    def update(self, info: Mapping[str, Any]) -> None:
        """Some of the weights, as the transfer backend takes them. After an error the server can't generate until a full update."""
        self._json("POST", "/update_weights", {"update_info": info}, UPDATE_TIMEOUT)

    def finish_update(self, label: str) -> None:
        self._json("POST", "/finish_weight_update", {"weight_version": label}, UPDATE_TIMEOUT)

    def load_adapter(self, name: str, path: str) -> None:
        """`path`: a directory in peft's layout that the server can read."""
        self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}, UPDATE_TIMEOUT)

    def unload_adapter(self, name: str) -> None:
        self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, self._timeout)

    def world_size(self) -> int:
        """Number of workers, over tensor, pipeline and data parallelism."""
        return int(self._field(self._json("GET", "/get_world_size"), "world_size"))

    def close(self) -> None:
        """Closes its connections; calls in flight fail. May be called twice."""
        self.hang_up()
        self._client.close()

    def _rpc(self, method: str) -> list[dict[str, Any]]:
        results = self._field(self._json("POST", "/collective_rpc", {"method": method}), "results")
        if not isinstance(results, list) or not results or not all(isinstance(r, dict) for r in results):
            raise ServerFault(
                self.url, f"answered {method} with {str(results)[:_EXCERPT]}, not with one object a worker"
            )
        return results

    def _field(self, answer: dict[str, Any], name: str) -> Any:
        if name not in answer:
            raise ServerFault(self.url, f"its answer has no {name!r}: {str(answer)[:_EXCERPT]}")
        return answer[name]

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        content = self._send(method, path, body, self._timeout if timeout is None else timeout)
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise ServerFault(
                self.url, f"{path} answered with malformed JSON ({error}): {_excerpt(content)}"
            ) from error
        if not isinstance(answer, dict):
            raise ServerFault(self.url, f"{path} answered with {_excerpt(content)}, not with a JSON object")
        return answer

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Remembers the socket of each connection that is made (httpcore's `trace` extension)."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._count:
                self._sockets.add(info["return_value"].get_extra_info("socket"))

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> bytes:
        if path == "/health":
            return self._exchange(method, path, body, timeout)
        with self._count:
            self._calls += 1
        try:
            return self._exchange(method, path, body, timeout)
        finally:
            with self._count:
                self._calls -= 1

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> bytes:
        limits = httpx.Timeout(timeout, connect=min(timeout, 10.0))
        extensions = {"trace": self._trace}
        try:
            response = self._client.request(method, self.url + path, json=body, timeout=limits, extensions=extensions)
            if response.status_code == 401 and self._has_new_token(response.request):
                response = self._client.request(
                    method, self.url + path, json=body, timeout=limits, extensions=extensions
                )
        except httpx.TimeoutException as error:
            raise ServerSilent(self.url, f"{path} gave no answer in {timeout:g} s") from error
        except httpx.TransportError as error:
            raise ServerGone(self.url, f"{path} failed: {error or type(error).__name__}") from error
        except httpx.HTTPError as error:
            raise ServerFault(self.url, f"{path} answered with something that can't be decoded: {error}") from error
        if response.status_code in (401, 403):
            raise ServerRefused(
                self.url,
                f"did not take the token (HTTP {response.status_code}). It is looked for in ${TOKEN_VARIABLE}, then in "
                f"rollout.token_file, then, for servers on this machine, in {token_path(_port(self.url))}; `llmrl serve` says where it "
                "wrote the server's",
            )
        if response.status_code != 200:
            text = _excerpt(response.content)
            if response.status_code >= 500:
                # vLLM closes the connection after an error of its own; the next call must see that before it uses it again.
                time.sleep(0.1)
            raise ServerFault(self.url, f"{path} answered HTTP {response.status_code}: {text}", response.status_code)
        return response.content

    def _has_new_token(self, refused: httpx.Request) -> bool:
        """Whether there is another token than the one that was refused; it is used from now on."""
        if self._renew is None:
            return False
        try:
            header = f"Bearer {self._renew()}"
        except ConfigError:
            return False
        self._client.headers["Authorization"] = header
        return refused.headers["Authorization"] != header


def _excerpt(content: bytes) -> str:
    text = " ".join(content.decode("utf-8", "replace").split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + " ..."
