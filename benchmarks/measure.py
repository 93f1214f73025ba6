"""Seconds and megabytes of one process. Import it first: it fixes the thread count and keeps the libraries quiet."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

THREADS = int(os.environ.get("BENCH_THREADS", "1"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
for _key, _value in (("TOKENIZERS_PARALLELISM", "false"), ("HF_HUB_OFFLINE", "1"), ("TRL_EXPERIMENTAL_SILENCE", "1")):
    os.environ.setdefault(_key, _value)
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def cpu_seconds() -> float:
    """User and system time of this process, all of its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory_mb(peak: bool = False) -> float:
    """Resident memory of this process in MB, now or at its highest."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: only the highest is known, and in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**10


class Meter:
    """CPU and wall seconds of a piece of work, and peak memory of the process over `baseline`, which is taken when the meter is made."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(THREADS)
        self.baseline = memory_mb()
        self.cpu = self.wall = 0.0

    def start(self) -> None:
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def stop(self) -> None:
        """May be called again, while the work goes on: the last call counts."""
        self.cpu, self.wall = cpu_seconds() - self._cpu, time.perf_counter() - self._wall

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()

    def report(self, **values: object) -> None:
        """One JSON line on standard output, which `run.py` reads."""
        line = {
            **values,
            "cpu_s": round(self.cpu, 3),
            "wall_s": round(self.wall, 3),
            "peak_over_imports_mb": round(memory_mb(peak=True) - self.baseline, 1),
            "matmul_gflops": round(matmul_flops() / 1e9, 1),
        }
        print("RESULT " + json.dumps(line), flush=True)


def matmul_flops(seconds: float = 0.5) -> float:
    """float32 operations a CPU second of a 1024 x 1024 x 1024 matrix product, in this process, now."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    start, count = cpu_seconds(), 0
    while cpu_seconds() - start < seconds:
        torch.mm(a, b, out=out)
        count += 1
    return count * 2 * 1024**3 / (cpu_seconds() - start)
