"""vLLM inside the training process: weights are loaded in place, and its memory is given back while training goes on.

vLLM takes a process to be its own, so every call of it is made `Apart` from the trainer's global state.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmrl.config.rollout import RolloutSettings
from llmrl.errors import ConfigError, RolloutError, SyncError
from llmrl.rollout import vllm_plugin
from llmrl.rollout.fingerprint import Fingerprint, fingerprint
from llmrl.rollout.vllm_answers import check_completion, check_request, sampling_parameters
from llmrl.rollout.vllm_apart import Apart, set_default_group
from llmrl.types import Completion, FinishReason, OnGroup, PolicyWeights, Prompt, Rollout, Sampling, SyncReport

logger = logging.getLogger("llmrl")

_OURS = {
    "model": "the model is the trainer's",
    "tokenizer": "prompts come as token ids",
    "skip_tokenizer_init": "prompts come as token ids",
    "load_format": "weights come from the trainer",
    "tensor_parallel_size": "set rollout.tensor_parallel_size",
    "gpu_memory_utilization": "set rollout.gpu_memory_utilization",
    "enable_sleep_mode": "set rollout.sleep_level",
    "distributed_executor_backend": "vLLM runs in the training processes",
    "pipeline_parallel_size": "every training process holds all layers",
    "data_parallel_size": "every training process, or tensor_parallel_size of them, already is a replica",
    "logprobs_mode": "training needs the log-probs of the distribution that was sampled from",
    "worker_cls": "weights are loaded and checked through vLLM's own worker",
    "worker_extension_cls": "weights are loaded and checked through vLLM's own worker",
    "enable_lora": "adapters are merged into the weights that are loaded",
    "quantization": "the fingerprint of quantised weights can't be compared with the trainer's",
    "speculative_config": "draft models would need weights of their own",
    "generation_config": "the recipe says how to sample",
    "seed": "set the recipe's seed",
}
"""Arguments of vLLM that can't be the user's, and why."""

_active = False


class ColocatedEngine:
    """Samples with a vLLM engine in this process (`RolloutEngine`).

    model_path: a directory with config.json, read only here; its `dtype` is vLLM's unless `vllm_args` names another. Weights in it are not
    read: the engine has none, and refuses to generate, until the first `sync_weights`. max_model_len: tokens of the longest prompt with its
    completion; None: what the model's config allows. With several processes (`world_size`), all of them make, sync and close their engines
    together; with tensor_parallel_size > 1 they generate together, too.

    `rest()` gives the device's memory back; the next sync wakes the engine (sleep_level 0 and the CPU keep everything).
    Raises ConfigError for arguments that can't work, and RolloutError where vLLM can't start.

    Example: engine.sync_weights(weights, 1); engine.generate([prompt], 8, Sampling(max_tokens=64)); engine.verify(); engine.rest()
    """

    def __init__(
        self,
        settings: RolloutSettings,
        tokenizer: Any,
        *,
        stop_token_ids: Iterable[int],
        model_path: str,
        max_model_len: int | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        global _active
        self.tokenizer, self.stop_token_ids = tokenizer, frozenset(stop_token_ids)
        self.tensor_parallel_size = settings.tensor_parallel_size
        self.version = 0
        self._engine: Any = None
        self._held: Fingerprint | None = None
        self._requests = count()
        _check(settings, world_size)
        if _active:
            raise ConfigError(
                "this process has a colocated vLLM engine already, and vLLM can hold one; close() it first"
            )
        args = _arguments(settings, model_path, max_model_len, seed, shared=dist.is_initialized())
        self._apart = Apart()
        self._own_group = not dist.is_initialized()
        _active = True
        atexit.register(self.close)  # before vLLM's own, which would end the trainer's process group with its own
        try:
            with self._apart(_launch_variables(rank)):
                self._engine = _start(args)
        except ConfigError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise RolloutError(
                f"vLLM could not start in the training process: {type(error).__name__}: {error}. It got {args}; lower "
                "rollout.gpu_memory_utilization when memory is short, or use rollout.engine local or vllm_server"
            ) from error
        config = self._engine.model_config
        self.dtype: torch.dtype = config.dtype
        self.max_model_len: int = config.max_model_len
        self.vocab_size: int = config.get_vocab_size()
        self.sleep_level = settings.sleep_level if torch.cuda.is_available() else 0
        self._asleep = False
        if settings.sleep_level and not self.sleep_level:
            logger.info("vLLM on the CPU can't sleep: rollout.sleep_level %d has no effect", settings.sleep_level)
        self._sleep(2)  # the weights are not worth keeping yet

    def sync_weights(self, weights: PolicyWeights, version: int) -> SyncReport:
        """Wakes the engine and loads `weights` in place, tensor by tensor, cast to its dtype.

        Raises SyncError when a tensor can't be loaded or when what vLLM then holds is not what was sent; the engine refuses to generate
        until a sync succeeds. `weights` is iterated to its end in any case, since other processes may take part in it.
        """
        engine = self._open()
        began = time.perf_counter()
        self._held = None
        stream = iter(weights)
        sent = _Sent(stream, self.dtype)
        try:
            with self._apart(), torch.no_grad():
                if self._asleep:
                    engine.wake_up(["weights"])
                _load(engine, sent)
                if self._asleep:
                    engine.wake_up(["kv_cache"])
                    self._asleep = False
                if not engine.reset_prefix_cache():
                    raise SyncError(
                        "vLLM did not drop the prefixes cached under the old weights: a request is still running"
                    )
        except SyncError:
            raise
        except Exception as error:
            raise SyncError(f"vLLM could not load weights {version}: {type(error).__name__}: {error}") from error
        finally:
            for _ in stream:
                pass
        held = self._fingerprint()
        if self.tensor_parallel_size == 1 and held.sum != sent.total.sum:
            raise SyncError(
                f"after loading weights {version}, vLLM holds other values than were sent (fingerprint {held.hex}, sent "
                f"{sent.total.hex}: {sent.total.count} tensors). A tensor was left out, came twice, or this model's weights are transformed on "
                "loading; use rollout.engine local or vllm_server for such a model"
            )
        self._held, self.version = held, version
        return SyncReport(version, sent.total.count, sent.total.bytes, sent.total.hex, time.perf_counter() - began)

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        """One group of `num_generations` rollouts a prompt, in the order of `prompts`; `on_group` is called as groups finish.

        An engine that rests wakes up, at level 1 with the weights of the last sync. Raises SyncError without weights, and RolloutError
        for prompts that can't be continued and for answers that can't be trained on.
        """
        engine = self._open()
        self._wake()
        check_request(
            prompts,
            num_generations,
            sampling,
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            remedy="Raise rollout.vllm_args.max_model_len",
        )
        requests, first = self._pool([(prompt.id, prompt.ids) for prompt in prompts])
        # A greedy group is one completion, repeated: vLLM refuses to sample it more than once.
        n = num_generations if sampling.temperature > 0 else 1
        places = {f"llmrl-{next(self._requests)}": i for i in range(len(requests))}
        groups: dict[int, list[Rollout]] = {}
        try:
            with self._apart():
                for name, i in places.items():
                    prompt_id, ids = requests[i]
                    _submit(engine, name, ids, sampling_parameters(sampling, prompt_id, n, self.stop_token_ids))
            while self._unfinished():
                with self._apart():
                    outputs = engine.step()
                for output in outputs:
                    place = places[output.request_id] - first
                    if not (output.finished and 0 <= place < len(prompts)):
                        continue
                    group = self._group(prompts[place], output, n, sampling)
                    groups[place] = group if n == num_generations else group * num_generations
                    if on_group is not None:
                        on_group(place, groups[place])
        except BaseException:
            with self._apart():
                engine.abort_request(list(places))
            raise
        if lost := [p.id for i, p in enumerate(prompts) if i not in groups]:
            raise RolloutError(f"vLLM finished without an answer for {len(lost)} prompts, such as {lost[0]!r}")
        return [groups[i] for i in range(len(prompts))]

    def probe(self, ids: Sequence[int], sampling: Sampling) -> list[Completion]:
        """This process's completion of `ids`."""
        return [self.generate([Prompt("probe", tuple(ids), "")], 1, sampling)[0][0].completion]

    def verify(self) -> None:
        """Raises SyncError when the weights in vLLM's memory are not those of the last sync. Not while it sleeps: it has none then."""
        if self._held is None or self._asleep:
            return
        held = self._fingerprint()
        if held != self._held:
            expected, self._held = self._held, None
            raise SyncError(
                f"the weights in vLLM's memory are no longer those of sync {self.version} (fingerprint {held.hex}, after the sync "
                f"{expected.hex}): something else wrote to them, such as a reload of the checkpoint"
            )

    def rest(self) -> None:
        """Gives the device's memory to the trainer, by `sleep_level`. Call it when a step's rollouts are made."""
        self._sleep(self.sleep_level)

    def close(self) -> None:
        """Ends the engine and frees its memory; the trainer's process group stays. With several processes all of them close."""
        global _active
        if self._engine is None and not _active:
            return
        engine, self._engine = self._engine, None
        with self._apart():
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            if not self._own_group:
                set_default_group(None)  # vLLM ends every group that it finds
            if engine is not None:
                engine.engine_core.shutdown()
            del engine
            cleanup_dist_env_and_memory()
        atexit.unregister(self.close)
        _active = False
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _open(self) -> Any:
        if self._engine is None:
            raise RolloutError("this engine was closed: make another one")
        return self._engine

    def _wake(self) -> None:
        """Makes the engine ready to sample with the weights of the last sync, or raises SyncError."""
        if self._held is not None and self._asleep and self.sleep_level == 1:
            with self._apart():
                self._engine.wake_up()
            self._asleep = False
            self.verify()
        if self._held is None or self._asleep:
            raise SyncError(
                "the engine holds no weights: none were loaded yet, a sync failed, or they were dropped when it went to sleep at "
                "level 2. Call sync_weights before generate"
            )

    def _sleep(self, level: int) -> None:
        if self._engine is not None and self.sleep_level and not self._asleep:
            with self._apart():
                self._engine.sleep(level)
            self._asleep = True

    def _fingerprint(self) -> Fingerprint:
        with self._apart(), torch.no_grad():
            (held,) = self._engine.apply_model(lambda model: fingerprint(p for _, p in model.named_parameters()))
        return held

    def _unfinished(self) -> bool:
        with self._apart():
            return self._engine.has_unfinished_requests()

    def _pool(self, mine: list[tuple[str, tuple[int, ...]]]) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
        """(the requests of all processes that share one copy of the model, the place of this one's first): each of them runs all."""
        if self.tensor_parallel_size == 1:
            return mine, 0
        with self._apart():
            from vllm.distributed.parallel_state import get_tp_group

            group = get_tp_group()
            parts: list[Any] = [None] * group.world_size
            dist.all_gather_object(parts, mine, group=group.cpu_group)
        return [request for part in parts for request in part], sum(map(len, parts[: group.rank_in_group]))

    def _group(self, prompt: Prompt, output: Any, n: int, sampling: Sampling) -> list[Rollout]:
        answers = sorted(output.outputs, key=lambda answer: answer.index)
        if [answer.index for answer in answers] != list(range(n)):
            raise RolloutError(f"vLLM gave {len(answers)} completions of prompt {prompt.id!r}, of {n} asked for")
        return [Rollout(prompt, self._completion(prompt, answer, sampling), i) for i, answer in enumerate(answers)]

    def _completion(self, prompt: Prompt, answer: Any, sampling: Sampling) -> Completion:
        """Raises RolloutError for an answer that breaks its promise."""
        ids = tuple(answer.token_ids)
        logprobs = [float(at[token].logprob) for token, at in zip(ids, answer.logprobs or (), strict=False)]
        try:
            stopped = check_completion(
                ids,
                logprobs,
                answer.finish_reason,
                max_tokens=sampling.max_tokens,
                stop_token_ids=self.stop_token_ids,
                vocab_size=self.vocab_size,
            )
        except ValueError as error:
            raise RolloutError(f"vLLM's answer to prompt {prompt.id!r} can't be trained on: {error}") from error
        text = self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
        finish: FinishReason = "stop" if stopped else "length"
        return Completion(ids, tuple(min(p, 0.0) for p in logprobs), finish, text, self.version)


class _Sent:
    """The stream of weights cast to vLLM's dtype; `total` is the fingerprint of what went through."""

    def __init__(self, stream: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
        self.stream, self.dtype = stream, dtype
        self.total = Fingerprint()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.stream:
            cast = tensor.detach().to(self.dtype)
            self.total += fingerprint([cast])
            yield name, cast


def _check(settings: RolloutSettings, world_size: int) -> None:
    for name in settings.vllm_args:
        if name in _OURS:
            raise ConfigError(f"rollout.vllm_args.{name} can't be set: {_OURS[name]}; remove it")
    size = settings.tensor_parallel_size
    if world_size % size:
        raise ConfigError(
            f"rollout.tensor_parallel_size {size} does not divide the {world_size} training processes, which share a model between "
            f"{size} of them; start a multiple of {size} processes, or lower it"
        )
    allocator = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if settings.sleep_level and torch.cuda.is_available() and "expandable_segments:True" in allocator:
        raise ConfigError(
            "vLLM can't sleep with PYTORCH_ALLOC_CONF=expandable_segments:True, since it has its own allocator; unset that, or set "
            "rollout.sleep_level to 0"
        )


def _arguments(
    settings: RolloutSettings, model_path: str, max_model_len: int | None, seed: int, *, shared: bool
) -> dict[str, Any]:
    """What vLLM's EngineArgs get; `shared`: the trainer has a process group."""
    config = json.loads(Path(model_path, "config.json").read_text())
    cuda = torch.cuda.is_available()
    args: dict[str, Any] = {
        # Not vLLM's "auto", which makes half precision of float32.
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "enforce_eager": not cuda,
        # On the CPU, vLLM 0.32 dies of a seeded request whose prompt it cuts: it takes back a draw, which CPU generators can't.
        "enable_chunked_prefill": cuda,
        "max_model_len": max_model_len,
        "disable_log_stats": True,
        **settings.vllm_args,
        "model": model_path,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enable_sleep_mode": cuda and settings.sleep_level > 0,
        "distributed_executor_backend": "external_launcher" if shared else "uni",
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "seed": seed,
    }
    return args


def _launch_variables(rank: int) -> dict[str, str]:
    """Environment variables that vLLM starts with; of the last three, those that are set stay."""
    local_rank = torch.cuda.current_device() if torch.cuda.is_available() else rank
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
    unset = {name: value for name, value in defaults.items() if name not in os.environ}
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", **unset}


def _start(args: dict[str, Any]) -> Any:
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine vllm_colocate needs vllm, which can't be imported here ({error}); install llmrl[vllm], or use "
            "rollout.engine local"
        ) from error
    os.environ[vllm_plugin.VARIABLE] = "1"
    vllm_plugin.register()  # before the model is made, whose CPU layers it concerns
    frozen = gc.get_freeze_count()
    try:
        arguments = EngineArgs(**args)
    except TypeError as error:
        raise ConfigError(f"rollout.vllm_args: {error}; see vllm's EngineArgs for what there is") from error
    engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
    if not frozen:
        gc.unfreeze()  # vLLM exempts all that is alive from garbage collection, the trainer's objects too
    return engine


def _submit(engine: Any, name: str, ids: Sequence[int], parameters: dict[str, Any]) -> None:
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    engine.add_request(
        name, tokens_input(list(ids)), SamplingParams(**parameters, output_kind=RequestOutputKind.FINAL_ONLY)
    )


def _load(engine: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replaces the weights in the engine's memory; when that fails, every layer has some weights again, of whatever values."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

    def load(model: Any) -> None:
        initialize_layerwise_reload(model)
        try:
            model.load_weights(weights)
            finalize_layerwise_reload(model, engine.model_config)
        except BaseException:
            # A later reload would go on from the tensors that this one has kept for its half-loaded layers.
            for layer in model.modules():
                info = get_layerwise_info(layer)
                if info.can_load():
                    _place_kernel_tensors(layer, info)
                    info.reset()
            raise

    with set_current_vllm_config(engine.vllm_config):
        engine.apply_model(load)
