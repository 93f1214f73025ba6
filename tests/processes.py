"""Processes of their own for tests, without the eight seconds of a core that each would take to import torch and transformers.

A fork server imports them once, and each process is a fork of it: nothing of the test's own process is in it. Its seed of hashes
is another than the test's, and each fork draws its own seeds of `random` and numpy, as a fresh process would.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Without tests of ours: the server looks for modules in the installed packages only.
IMPORTED = [
    "torch", "accelerate", "peft", "transformers", "transformers.models.qwen2.modeling_qwen2", "llmrl.algorithms.sft",
    "llmrl.algorithms.grpo", "llmrl.algorithms.ppo", "llmrl.algorithms.dpo", "llmrl.algorithms.reward_model",
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """As subprocess.CompletedProcess: the first exit status that is not 0 (-N: signal N), and what all wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_script(script: Path, *arguments: Any, processes: int = 1, timeout: float = 300.0) -> Ended:
    """Runs `python script arguments...`, or several of it with the environment that torchrun gives."""
    return _run(_script, processes, (str(script), tuple(map(str, arguments))), timeout)


def run_processes(target: Callable[..., None], processes: int, *args: Any, timeout: float = 120.0) -> None:
    """Runs `target(*args)`, a module's function, in so many processes that torchrun might have started; fails when one fails."""
    ended = _run(target, processes, args, timeout)
    assert ended.returncode == 0, f"exit status {ended.returncode}\n{ended.stderr[-6000:]}"


def _run(target: Callable[..., None], processes: int, args: tuple[Any, ...], timeout: float) -> Ended:
    """When one process fails the others are killed: they would wait for it."""
    with TemporaryDirectory() as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        started = start_processes(target, args, [(out, err)] * processes)
        try:
            running, deadline = started, time.monotonic() + timeout
            while running and not any(p.exitcode for p in started):
                if not wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"not ended within {timeout} s:\n{err.read_text()[-6000:]}")
                running = [p for p in running if p.exitcode is None]
            return Ended(next((p.exitcode for p in started if p.exitcode), 0), out.read_text(), err.read_text())
        finally:
            for process in started:
                process.kill()
                process.join()


def start_processes(
    target: Callable[..., None], args: tuple[Any, ...], outputs: Sequence[tuple[Path, Path]]
) -> list[Any]:
    """Starts `target(*args)` once for each (standard output, standard error); whoever calls ends and joins the processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    port = _free_port()
    started = []
    for rank, (out, err) in enumerate(outputs):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= _ranks(rank, len(outputs), port)
        process = context.Process(target=_enter, args=(environment, str(out), str(err), target, args))
        process.start()
        started.append(process)
    return started


def _ranks(rank: int, processes: int, port: int) -> dict[str, str]:
    if processes == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _enter(environment: Mapping[str, str], out: str, err: str, target: Callable[..., None], args: Any) -> None:
    for number, file in ((1, out), (2, err)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    import numpy as np
    import torch

    np.random.seed()
    torch.set_num_threads(1)
    target(*args)


def _script(script: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
