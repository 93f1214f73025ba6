"""A bearer token on every route of a generation server. vLLM's own `--api-key` leaves the routes that change weights open."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

TOKEN_VARIABLE = "LLMRL_SERVER_TOKEN"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def token_path(port: int) -> Path:
    """Where `llmrl serve` writes a token that it makes, for a server of this machine alone: ~/.llmrl/token-<port>."""
    return Path.home() / ".llmrl" / f"token-{port}"


class RequireToken:
    """ASGI middleware (`vllm ... --middleware llmrl.rollout.vllm_auth.RequireToken`): 401 without `Authorization: Bearer TOKEN`.

    The token is that of the environment variable LLMRL_SERVER_TOKEN; without one the server does not start. It stands before vLLM's own
    middleware and routing, so unknown routes and CORS preflights are refused too. WebSockets are closed before they are accepted, and a
    refused request's body is never read.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise RuntimeError(f"{TOKEN_VARIABLE} is not set: start the server with `llmrl serve`, which makes a token")
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        if len(given) == 1 and hmac.compare_digest(given[0], self._expected):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps({"error": "this server needs the header Authorization: Bearer TOKEN"}).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"www-authenticate", b"Bearer"),
            ]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})
