"""A judge behind an OpenAI-compatible endpoint: one request at a time for its caller, with retries, a budget and a meter."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import logging
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from llmrl.config.rubric import JudgeSettings
from llmrl.errors import ConfigError
from llmrl.rewards.base import ERROR, TIMEOUT
from llmrl.rewards.judge_budget import JudgeError, MeteredJudge
from llmrl.types import Messages

logger = logging.getLogger("llmrl.rewards")
_FIRST_DELAY, _LONGEST_DELAY, _LONGEST_WISH = 0.5, 60.0, 600.0
_EXCERPT = 300
_CHARACTERS_PER_TOKEN = 4  # only where a server does not count
# As `llmrl serve` has them (llmrl.rollout.vllm_auth, which this folder may not import).
_TOKEN_VARIABLE, _TOKEN_FILE = "LLMRL_SERVER_TOKEN", "~/.llmrl/token-{port}"


class _BadRequest(JudgeError):
    """The server does not take this request: 400 or 422."""


class OpenAIJudge(MeteredJudge):
    """A `Judge` (llmrl.types) that posts to /v1/chat/completions. Its coroutines belong to one event loop.

    The reply is constrained to the schema where the server can do that. Whether it can is seen at the first request: a server that
    answers 400 or 422 with `response_format`, and 200 without, is not sent it again. 408, 429, 5xx, lost connections and timeouts are
    tried again after 0.5 s, 1 s, 2 s, ... (times 0.5 to 1.5 at random), and not before the server's Retry-After has passed, which all requests
    then wait for. Every request counts against the budget; requests in flight may take the tokens a little over it.

    Raises ConfigError where the key that is named is not in the environment, and without a base_url.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        super().__init__(settings)
        if settings.base_url is None:
            raise ConfigError("this judge asks a server: give `judge.base_url`")
        base = settings.base_url.rstrip("/")
        self._url = f"{base}/chat/completions" if urlsplit(base).path else f"{base}/v1/chat/completions"
        local = _is_loopback(base)
        token = _key(settings, base, local)
        self._client = httpx.AsyncClient(
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})},
            timeout=httpx.Timeout(settings.timeout, connect=min(settings.timeout, 10.0), pool=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            trust_env=not local,  # a proxy, where the judge is not on this machine
        )
        self._constrains: bool | None = None
        self._limit_name = "max_tokens"
        self._not_before = 0.0

    async def ask(self, messages: Messages, schema: Mapping[str, Any]) -> str:
        """The reply. Raises JudgeError, BudgetSpent when there is no budget for another request."""
        body: dict[str, Any] = {"model": self.settings.model, "messages": messages}
        if self.settings.temperature is not None:
            body["temperature"] = self.settings.temperature
        if self._constrains is False:
            return await self._post(body)
        form = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
        try:
            text = await self._post({**body, "response_format": form})
        except _BadRequest as error:
            text = await self._post(body)  # a prompt that is too long is refused again, and that is the error
            if self._constrains is None:
                self._constrains = False
                logger.warning(
                    "the judge's server does not constrain replies to a JSON schema; they are read as they come: %s",
                    error,
                )
            return text
        self._constrains = True
        return text

    async def close(self) -> None:
        await self._client.aclose()

    async def _post(self, body: Mapping[str, Any]) -> str:
        for attempt in range(self.settings.retries + 1):
            while (
                wait := self._not_before - time.monotonic()
            ) > 0:  # again, as another request may have met a longer wish
                await asyncio.sleep(wait * random.uniform(1.0, 1.1))
            self._pay()
            started, limit = time.monotonic(), self._limit_name
            try:
                # ASCII: half of an emoji in the data is no reason to send nothing.
                content = json.dumps({**body, limit: self.settings.max_tokens})
                async with asyncio.timeout(
                    self.settings.timeout
                ):  # httpx's is for each piece: drops of an answer never end
                    response = await self._client.post(self._url, content=content)
            except (httpx.TimeoutException, TimeoutError):
                problem, kind, wish = f"no answer in {self.settings.timeout:g} s", TIMEOUT, 0.0
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem, kind, wish = f"the request failed: {error or type(error).__name__}", ERROR, 0.0
            else:
                status = response.status_code
                if status == 200:
                    return self._read(response, body, time.monotonic() - started)
                if status in (400, 422) and limit == "max_tokens" and "max_completion_tokens" in response.text:
                    self._limit_name = "max_completion_tokens"  # OpenAI's reasoning models take no other
                    return await self._post(body)
                self._raise_final(response)
                problem, kind, wish = f"HTTP {status}: {_excerpt(response.text)}", ERROR, _retry_after(response)
                if status == 429 or wish:
                    self._not_before = max(self._not_before, time.monotonic() + wish)
            if attempt < self.settings.retries:
                self.meter.retries += 1
                delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**attempt) * random.uniform(0.5, 1.5)
                await asyncio.sleep(delay)
        tries = self.settings.retries + 1
        raise JudgeError(f"{self._url}: {problem} ({tries} {'try' if tries == 1 else 'tries'})", kind, kind == TIMEOUT)

    def _raise_final(self, response: httpx.Response) -> None:
        """Raises for an answer that trying again can't change."""
        status, text = response.status_code, _excerpt(response.text)
        if status in (408, 409, 429) or status >= 500:
            return
        if status in (400, 422):
            raise _BadRequest(f"{self._url}: HTTP {status}: {text}", row_caused=True)
        hint = ""
        if status in (401, 403):
            key = self.settings.api_key_env
            hint = f". The key is {f'${key}' if key else 'not given: name its environment variable in `judge.api_key_env`'}"
            if not key and _is_loopback(self._url):
                hint = f". Without `judge.api_key_env` it is ${_TOKEN_VARIABLE}, else what `llmrl serve` wrote to ~/.llmrl/token-PORT"
        elif status == 404:
            hint = f". Look at `judge.base_url` and at the model's name there, {self.settings.model!r}"
        raise JudgeError(f"{self._url}: HTTP {status}: {text}{hint}")

    def _read(self, response: httpx.Response, body: Mapping[str, Any], seconds: float) -> str:
        try:
            answer = response.json()
            text = answer["choices"][0]["message"]["content"]
            usage = answer.get("usage") or {}
            read, written = (usage.get(f"{kind}_tokens") for kind in ("prompt", "completion"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise JudgeError(f"{self._url}: an answer that is no chat completion: {_excerpt(response.text)}") from error
        text = text if isinstance(text, str) else ""
        if not isinstance(read, int):
            read = len(json.dumps(body["messages"])) // _CHARACTERS_PER_TOKEN
        if not isinstance(written, int):
            written = len(text) // _CHARACTERS_PER_TOKEN
        self._count(read, written, seconds)
        return text


def _key(settings: JudgeSettings, base: str, local: bool) -> str:
    if settings.api_key_env:
        key = os.environ.get(settings.api_key_env, "").strip()
        if not key:
            raise ConfigError(
                f"judge.api_key_env names ${settings.api_key_env}, which is not set; put the judge's key there"
            )
        return key
    if not local:  # a token of this machine goes nowhere else
        return ""
    if token := os.environ.get(_TOKEN_VARIABLE, "").strip():
        return token
    try:
        return Path(_TOKEN_FILE.format(port=urlsplit(base).port)).expanduser().read_text().strip()
    except (OSError, ValueError):
        return ""


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait (a number or a date), 0 without."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_WISH) if seconds == seconds else 0.0


def _excerpt(text: str) -> str:
    text = " ".join(text[: 4 * _EXCERPT].split())
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + " ..."
