"""What the GPU checks share: the list of checks, lines of results, clocks, shapes and rows.

With GPU_CHECK_REHEARSAL=1 everything runs on the CPU with small shapes, so that the code of the checks can be tested without a GPU: figures
of speed and memory mean nothing then, and every line says "rehearsal".
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrl.types import Example

TRAINERS = ("pydantic", "yaml", "rich", "accelerate", "peft", "safetensors", "datasets", "matplotlib", "httpx")
REHEARSAL = os.environ.get("GPU_CHECK_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
CHECKS: dict[str, Callable[[], None]] = {}
FAILED: list[str] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def emit(name: str, ok: bool | None = None, **values: object) -> None:
    """One line; `ok` False makes the whole run fail, None is a figure without a bound."""
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    line = {
        "check": name,
        **rounded,
        **({} if ok is None else {"ok": bool(ok)}),
        **({"rehearsal": 1} if REHEARSAL else {}),
    }
    print(json.dumps(line), flush=True)
    if ok is False:
        FAILED.append(name)


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def lacks(check_name: str, *more: str) -> bool:
    """Whether packages that the trainers need, or `more`, are not installed; then says so in a line."""
    lost = missing((*TRAINERS, *more))
    if lost:
        emit(check_name, skipped=f"not installed: {', '.join(lost)} (install llmrl, or carry their wheels)")
    return bool(lost)


def result_of(module: str, *arguments: str, **variables: str) -> dict[str, Any]:
    """What `python -m gpu.<module> arguments...` prints behind "RESULT ", run with these environment variables beside ours.

    Raises RuntimeError with the end of its errors where it prints none.
    """
    benchmarks, root = Path(__file__).resolve().parents[1:3]
    path = os.pathsep.join([str(benchmarks), str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-m", f"gpu.{module}", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"{' '.join(command[2:])} with {variables}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Appends the seconds of the block, the device's work included."""
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    seconds.append(time.perf_counter() - start)


class Peak:
    """Device memory, in MiB, at its highest since this was made, over what was allocated then. 0 in a rehearsal."""

    def __init__(self) -> None:
        self._before = 0.0
        gc.collect()  # a trainer is a cycle: what the last one left would be freed during this measurement
        if not REHEARSAL:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20

    def megabytes(self) -> float:
        if REHEARSAL:
            return 0.0
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20 - self._before


def peak_over(work: Callable[[], object]) -> float:
    """MiB that the device's memory rises by, at its highest, while `work` runs."""
    peak = Peak()
    work()
    return peak.megabytes()


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2 model; `tied`: embedding and head are one matrix."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True

    @property
    def layer_parameters(self) -> int:
        """Matrices of all layers, without biases and norms."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * (2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.intermediate)

    def flops(self, tokens: int, loss_tokens: int, pairs: float, passes: float = 3.0) -> float:
        """Operations that training needs: 2 `passes` a layer weight and token, 2 `passes` a head weight and token in the loss, and
        4 `passes` x layers x hidden for each pair of a token and one that it sees. A forward is 1 pass, its backward 2."""
        matrices = self.layer_parameters * tokens + self.hidden * self.vocabulary * loss_tokens
        return passes * (2.0 * matrices + 4.0 * self.layers * self.hidden * pairs)


QWEN = {  # of Qwen2.5, config.json
    "0.5B": Shape(896, 4864, 24, 14, 2, 151_936),
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151_936),
}
SMALL = {"0.5B": Shape(64, 128, 2, 4, 2, 512), "1.5B": Shape(96, 192, 2, 6, 2, 512)}
SHAPES = SMALL if REHEARSAL else QWEN


def make_model(shape: Shape, dtype: torch.dtype = torch.float32, layers: int | None = None, seed: int = 0) -> Any:
    """A model with random weights on the device; `layers` instead of the shape's."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096, tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_tokenizer(vocabulary: int) -> Any:
    """A token a word: "w1 w2" are the tokens 1 and 2; token 0 ends a text and pads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def lengths_of(count: int, shortest: int, longest: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(shortest, longest + 1, count).tolist()


def examples(lengths: Sequence[int], vocabulary: int, prompt_share: float = 0.5) -> list[Example]:
    """Random rows, the last part of each in the loss, with weights that make the loss a sum over tokens."""
    rng, rows = np.random.default_rng(0), []
    for unit, length in enumerate(lengths):
        mask = np.arange(length) >= max(1, int(length * prompt_share))
        ids = rng.integers(1, vocabulary, length).astype(np.int32)
        rows.append(Example(ids, mask, unit=unit, payload={"weights": mask.astype(np.float32)}))
    return rows


def seen_pairs(rows: Sequence[Example]) -> float:
    """Pairs of a token and one that it sees, itself half: n prefix + n^2 / 2 for the n tokens behind a prefix."""
    return sum(len(e) * e.prefix + len(e) ** 2 / 2 for e in rows)


def bounds(lengths: Sequence[int]) -> tuple[Tensor, tuple[int, ...], int]:
    """(cu_seqlens on the device, the same on the host, longest)."""
    host = (0, *np.cumsum(lengths).tolist())
    return torch.tensor(host, dtype=torch.int32, device=DEVICE), host, max(lengths)


def gradient_of(module: torch.nn.Module) -> Tensor:
    """All gradients in one vector, in float32; they are then forgotten."""
    flat = torch.cat([p.grad.float().flatten() for p in module.parameters() if p.grad is not None])
    module.zero_grad()
    return flat


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled)
