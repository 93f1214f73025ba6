"""vLLM beside a trainer in one process: each finds the global state of torch and of the process as it left it.

vLLM takes a process to be its own: it makes a default process group, seeds every generator, replaces functions of torch, sets
environment variables (LD_PRELOAD and LOCAL_WORLD_SIZE among them) and may change the number of threads.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _update_default_pg


class Apart:
    """`with apart():` is where vLLM runs: it finds the global state that it left, and the trainer's is back afterwards.

    That is: generators, default process group, environment, number of threads, functions that vLLM replaces, default dtype, precision
    of matrix products, current device.
    """

    def __init__(self) -> None:
        self._inside: list[Any] | None = None

    @contextmanager
    def __call__(self, variables: Mapping[str, str] | None = None) -> Iterator[None]:
        outside = [read() for read, _ in _STATE]
        for (_, write), value in zip(_STATE, self._inside or ()):
            write(value)
        os.environ.update(variables or {})
        try:
            yield
        finally:
            self._inside = [read() for read, _ in _STATE]
            for (_, write), value in zip(_STATE, outside):
                write(value)


def _set_environment(variables: dict[str, str]) -> None:
    if dict(os.environ) != variables:
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)


def set_default_group(group: Any) -> None:
    if dist.group.WORLD is not group:
        _update_default_pg(group)


_PATCHED: tuple[tuple[Any, str], ...] = (
    (torch, "set_num_threads"),
    (torch, "Event"),
    (torch.Tensor, "pin_memory"),
    (torch.Tensor, "record_stream"),
    *((torch.cuda, name) for name in ("Event", "Stream", "set_stream", "current_stream", "stream")),
    *((torch.accelerator, name) for name in ("synchronize", "empty_cache", "get_memory_info")),
)
"""What vLLM's CPU worker replaces, mostly by what does nothing (`vllm.v1.worker.cpu.shm`, `cpu_worker`, `cpu_model_runner`)."""
_set_num_threads = torch.set_num_threads


def _patched() -> list[Any]:
    return [getattr(owner, name) for owner, name in _PATCHED]


def _set_patched(functions: list[Any]) -> None:
    for (owner, name), function in zip(_PATCHED, functions):
        setattr(owner, name, function)


def _set_threads(number: int) -> None:
    if torch.get_num_threads() != number:
        _set_num_threads(number)


def _cuda(read: Callable[[], Any]) -> Any:
    """None before CUDA is initialised, which must not happen here."""
    return read() if torch.cuda.is_initialized() else None


def _set_cuda_generators(states: list[torch.Tensor] | None) -> None:
    if states is not None:
        torch.cuda.set_rng_state_all(states)


def _set_cuda_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


_STATE: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.get_rng_state, torch.set_rng_state),
    (np.random.get_state, np.random.set_state),
    (random.getstate, random.setstate),
    (lambda: _cuda(torch.cuda.get_rng_state_all), _set_cuda_generators),
    (lambda: _cuda(torch.cuda.current_device), _set_cuda_device),
    (lambda: dist.group.WORLD, set_default_group),
    (lambda: dict(os.environ), _set_environment),
    (_patched, _set_patched),
    (torch.get_num_threads, _set_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
)
