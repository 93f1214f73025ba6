"""What the launcher asked for, against what came up: a run must not silently be smaller or other than it was asked to be."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmrl.errors import ConfigError

_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_UNSUPPORTED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism_config",
}
_RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""Keys of a DeepSpeed configuration that the recipe decides: "auto" or 1 is fine."""
_REFUSED = ("optimizer", "scheduler", "bf16", "fp16", "amp", "torch_autocast")


@dataclass(frozen=True)
class Launch:
    """How a launch file wants model and optimizer to lie on the processes; read from the variables that `accelerate launch` sets.

    ram_efficient: only the first process of all reads the weights. zero: DeepSpeed's `zero_optimization` and whatever else of its
    configuration is not llmrl's to decide.
    """

    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    reshard_after_forward: bool = True
    offload_params: bool = False
    ram_efficient: bool = False
    layer_classes: tuple[str, ...] = ()
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def shards_parameters(self) -> bool:
        return self.strategy in ("fsdp2", "zero3")


def read_launch(env: Mapping[str, str], mixed_precision: str) -> Launch:
    """What the launcher asks for. `mixed_precision` is the recipe's.

    Raises ConfigError, before any process group is made, for what llmrl can't do.
    """
    for name, what in _UNSUPPORTED.items():
        if _is_on(env, name):
            raise ConfigError(
                f"the launcher asks for {what} ({name}={env[name]}), which llmrl does not support. Launch with one of "
                "recipes/accelerate: single, ddp, fsdp2, zero2, zero3, multi_node"
            )
    asked = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", mixed_precision):
        raise ConfigError(
            f"the launcher asks for mixed precision {asked} (ACCELERATE_MIXED_PRECISION), the recipe for {mixed_precision}. "
            f"The recipe decides: set mixed_precision there, and launch with `--mixed_precision {mixed_precision}` or without"
        )
    compiler = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        raise ConfigError(
            f"the launcher asks for torch.compile ({compiler}), which llmrl does not use: packed batches change shape every step. "
            "Launch with `--dynamo_backend no`"
        )
    if not (_is_on(env, _FSDP) or _is_on(env, _DEEPSPEED)):
        return Launch()
    if "RANK" not in env:
        raise ConfigError(
            "the launcher asks for sharding but started one process without a rank, as accelerate does on the CPU: start the processes with "
            "`llmrl KIND --accelerate NAME --num_processes N ...`, or with torchrun"
        )
    if mixed_precision == "fp16":
        raise ConfigError("mixed_precision fp16 does not go with sharded training here: use bf16, or launch with ddp")
    return _deepspeed(env) if _is_on(env, _DEEPSPEED) else _fsdp(env)


@contextmanager
def without_accelerates_sharding() -> Iterator[None]:
    """accelerate makes the process group inside, and no more: it would load, wrap and step by itself, and differently on the CPU.

    transformers would read weights on the first process alone where it finds this variable; llmrl does that itself, and it stays away.
    """
    os.environ.pop(_RAM_EFFICIENT, None)
    kept = {name: os.environ.pop(name) for name in (_FSDP, _DEEPSPEED) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _fsdp(env: Mapping[str, str]) -> Launch:
    if env.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            f"the launcher asks for FSDP {env.get('FSDP_VERSION', '1')}; llmrl shards with FSDP2: set fsdp_version: 2, or launch with "
            "recipes/accelerate/fsdp2.yaml"
        )
    if _is_on(env, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "the launcher asks for fsdp_activation_checkpointing; the recipe decides: gradient_checkpointing: true there"
        )
    classes = env.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    return Launch(
        "fsdp2",
        reshard_after_forward=env.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("true", "1"),
        offload_params=_is_on(env, "FSDP_OFFLOAD_PARAMS"),
        ram_efficient=_is_on(env, _RAM_EFFICIENT),
        layer_classes=tuple(name.strip() for name in classes.split(",") if name.strip()),
    )


def _deepspeed(env: Mapping[str, str]) -> Launch:
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        try:
            config = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"the launcher's DeepSpeed configuration {file} can't be read: {error}") from error
    else:
        devices = {
            what: env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
            for what in ("optimizer", "param")
        }
        stage = int(env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        offload = {f"offload_{what}": {"device": device} for what, device in devices.items() if device != "none"}
        config = {"zero_optimization": {"stage": stage, **offload}}
        if (steps := env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")).isdigit():
            config["gradient_accumulation_steps"] = int(steps)
    for key in _REFUSED:
        section = config.get(key)
        if section is not None and (
            not isinstance(section, dict) or section.get("enabled", True) not in (False, "auto")
        ):
            raise ConfigError(f"the DeepSpeed configuration has {key!r}; the recipe decides that: leave it out")
    for key in _OURS[:3]:
        if config.get(key, "auto") not in ("auto", 1):
            raise ConfigError(
                f"the DeepSpeed configuration has {key}: {config[key]}; llmrl cuts microbatches by tokens_per_microbatch and accumulates "
                'as many as there are: leave it out, or "auto"'
            )
    if config.get("gradient_clipping", "auto") not in ("auto", 0):
        raise ConfigError(
            f"the DeepSpeed configuration has gradient_clipping: {config['gradient_clipping']}; the recipe's max_grad_norm decides: leave it "
            'out, or "auto"'
        )
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage")
    if stage not in (2, 3):
        raise ConfigError(
            f"the launcher asks for DeepSpeed ZeRO stage {stage}; llmrl runs stages 2 and 3 (without sharding: ddp)"
        )
    for what in ("optimizer", "param"):
        if (zero.get(f"offload_{what}") or {}).get("device") == "nvme":
            raise ConfigError(f"the launcher asks for offload_{what} to nvme; llmrl offloads to cpu")
    kept = {key: value for key, value in config.items() if key not in (*_OURS, *_REFUSED)}
    # accelerate's zero3_init: parameters are never whole on every process.
    init = env.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true").lower() in ("true", "1")
    return Launch("zero2" if stage == 2 else "zero3", ram_efficient=stage == 3 and init, zero=kept)


def _is_on(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() in ("true", "1")


def check_sharded(config: Any, strategy: str) -> None:
    """Raises ConfigError for keys of a recipe (of ModelFields and TrainFields) that need whole parameters on every process."""
    refused = []
    if config.optimizer == "adamw_8bit":
        refused.append("optimizer: adamw_8bit (bitsandbytes updates whole tensors; sharded moments are small already)")
    if config.quantization is not None:
        refused.append(
            f"quantization: {config.quantization} (packed codes can't be cut into rows; weights are divided already)"
        )
    if refused:
        raise ConfigError(
            f"{' and '.join(refused)} does not go with {strategy}: leave it out, or launch with single or ddp"
        )


def check_world_size(env: Mapping[str, str], world_size: int, num_processes: int | None) -> None:
    """Refuses a number of processes that differs from the recipe's or the launcher's.

    `accelerate launch --cpu --num_processes 2` starts ONE process and says nothing (accelerate 1.15): it is recognised by a
    rendezvous address without a rank.
    """
    hint = "start the processes with `llmrl KIND --accelerate ddp --num_processes N ...` or `torchrun --nproc_per_node N -m llmrl.cli ...`"
    if num_processes is not None:
        if num_processes != world_size:
            raise ConfigError(
                f"num_processes is {num_processes}, but {world_size} came up: {hint}, or change num_processes"
            )
        return
    asked = env.get("WORLD_SIZE", "")
    if asked.isdigit() and int(asked) != world_size:
        raise ConfigError(f"WORLD_SIZE is {asked}, but the process group has {world_size} process(es): {hint}")
    launched = "ACCELERATE_MIXED_PRECISION" in env
    if launched and not asked and {"MASTER_ADDR", "MASTER_PORT"} <= env.keys() and world_size == 1:
        raise ConfigError(
            "accelerate launch was asked for several processes but started only one: it does so for CPU processes on one machine. "
            f"Instead, {hint}. If one process is what you want, set num_processes: 1 in the recipe"
        )


def local_device() -> str:
    """The device of this process, known before any process group is made."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
