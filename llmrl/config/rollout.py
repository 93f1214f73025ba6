"""How completions are sampled."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llmrl.config.base import Strict


class RolloutSettings(Strict):
    """The engine: `local` samples in the training process, on any device; `vllm_server` asks servers that `llmrl serve` started;
    `vllm_colocate` runs vLLM inside the training process."""

    engine: Literal["local", "vllm_server", "vllm_colocate"] = Field(
        "local",
        description="local: in the training process; vllm_server: `llmrl serve`; vllm_colocate: vLLM in this process",
    )
    max_batch_tokens: int = Field(262_144, ge=1, description="local: cache slots (rows x length) decoded at once")

    urls: list[str] = Field([], description="vllm_server: http://host:port of each server")
    token_file: str | None = Field(
        None,
        description="vllm_server: file with the servers' token; default: $LLMRL_SERVER_TOKEN, else what `llmrl serve` wrote here",
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="vllm_server: steps that rollouts may be made ahead of the one that trains; 0: strictly on policy",
    )
    transfer: Literal["disk", "nccl"] = Field(
        "disk", description="vllm_server: weights go through files (any machine) or from GPU to GPU"
    )
    transfer_dir: str | None = Field(
        None,
        description="disk: a directory that trainer and servers see; default: shared memory for servers on this machine, else in output_dir",
    )
    nccl_address: str | None = Field(
        None, description="nccl: address of the training machine that the servers reach; default: its host name"
    )
    max_concurrency: int = Field(
        64, ge=1, description="vllm_server: groups in flight on a server, from each training process"
    )
    request_timeout: float = Field(
        1800, gt=0, description="vllm_server: seconds for one group before it is sent elsewhere"
    )
    start_timeout: float = Field(
        900, gt=0, description="vllm_server: seconds to wait for servers that are not up, or that died"
    )

    gpu_memory_utilization: float = Field(
        0.3, gt=0, lt=1, description="vllm_colocate: vLLM's share of the device's memory"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="vllm_colocate: processes that share one copy of the model")
    sleep_level: Literal[0, 1, 2] = Field(
        1,
        description="vllm_colocate: while training, vLLM keeps everything (0), drops its cache and moves weights away (1), drops both (2)",
    )
    vllm_args: dict[str, Any] = Field(
        {}, description="vllm_colocate: further arguments of vllm.LLM, such as max_model_len"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, field in type(self).model_fields.items():
            engine = _ENGINE_OF.get(name, "vllm_server")
            if name != "engine" and engine != self.engine and getattr(self, name) != field.default:
                raise ValueError(
                    f"rollout.{name} is for engine {engine}, and the engine is {self.engine}; remove it, or change `engine`"
                )
        if self.engine == "vllm_server":
            if not self.urls:
                raise ValueError(
                    "engine vllm_server needs rollout.urls, such as [http://127.0.0.1:8000]; start a server with `llmrl serve --model M`"
                )
            for url in self.urls:
                if not url.startswith(("http://", "https://")):
                    raise ValueError(f"rollout.urls: {url!r} is not a URL; write http://host:port")
            if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
                raise ValueError("rollout.urls names a server twice")
            if self.nccl_address is not None and self.transfer != "nccl":
                raise ValueError(
                    "rollout.nccl_address is for transfer nccl, and the transfer is disk; remove one of them"
                )
        return self


_ENGINE_OF = {
    "max_batch_tokens": "local",
    "gpu_memory_utilization": "vllm_colocate",
    "tensor_parallel_size": "vllm_colocate",
    "sleep_level": "vllm_colocate",
    "vllm_args": "vllm_colocate",
}
"""Keys of one engine alone; all others are vllm_server's."""


class RolloutFields(Strict):
    """Rollouts."""

    rollout: RolloutSettings = Field(RolloutSettings(), description="the engine that samples")
    max_logprob_gap: float | None = Field(
        None,
        gt=0,
        description="stop when mean |sampled - recomputed| exceeds this; default 1e-3 in float32, 0.05 in fp16, 0.1 in bf16",
    )
    eval_num_generations: int = Field(1, ge=1, description="completions a prompt in evaluations")
    eval_temperature: float = Field(0.0, ge=0, description="temperature in evaluations; 0 is greedy")


class SamplingFields(Strict):
    """Sampling."""

    temperature: float = Field(1.0, ge=0, description="divides the logits; 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 turns it off")
    top_k: int = Field(0, ge=0, description="0 turns it off")
    min_p: float = Field(0.0, ge=0, lt=1, description="0 turns it off")
    max_prompt_length: int | None = Field(None, ge=1, description="tokens; longer prompts go by `on_overlong`")
    max_completion_length: int = Field(256, ge=1, description="tokens sampled at most")

    def check_for_training(self, why_not_greedy: str) -> None:
        """Raises ValueError for a sampler whose log-probs training can't reproduce, and for a greedy one."""
        if self.top_p < 1 or self.top_k > 0 or self.min_p > 0:
            raise ValueError(
                "top_p < 1, top_k > 0 or min_p > 0 sample from a part of the vocabulary, but training log-probs are over all of it: "
                "the importance ratio would be biased. Use temperature alone for training (evaluation takes all four)"
            )
        if self.temperature == 0:
            raise ValueError(f"temperature 0 {why_not_greedy}; use a temperature above 0")
