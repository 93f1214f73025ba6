"""Rollouts side by side, and what sampling ahead of training saves.

    make bench-rollouts            # or: python benchmarks/rollouts.py [sampling] [overlap]

`sampling`: tokens a second of the local engine, of one and of two generation servers, and of `model.generate` as TRL calls it (left-padded
prompts, one call), on the same 64 prompts x 64 new tokens, in turn in one run; no completion may stop early, so all sample as many tokens.
Every process has one thread, so two servers use two cores: the CPU seconds of all processes together are given as well.
`overlap`: a GRPO step against one server with max_staleness 0 and 1, in turn: its seconds, and those that it waited for rollouts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure  # noqa: F401 - fixes the thread count first
import psutil
from assets import assets_dir, build, rows
from tasks import digit_share

PROMPTS, NEW_TOKENS, ROUNDS = 64, 64, int(os.environ.get("ROUNDS", "3"))
START_SECONDS = 600


@contextlib.contextmanager
def servers(count: int, model: Path) -> Iterator[list[tuple[str, psutil.Process]]]:
    """Started by `llmrl serve`, each with one request behind it, and ended with all that they started."""
    os.environ["LLMRL_SERVER_TOKEN"] = secrets.token_urlsafe(16)
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    started = []
    try:
        for _ in range(count):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            command = [sys.executable, "-m", "llmrl.cli", "serve", "--model", str(model), "--port", port]
            command += ["--max-model-len", "512", "--dtype", "float32"]
            log = (assets_dir() / f"server-{port}.log").open("w")
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            started.append((f"http://127.0.0.1:{port}", process))
        for url, process in started:
            _wait(url, process)
        yield [(url, psutil.Process(process.pid)) for url, process in started]
    finally:
        for _, process in started:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)


def _wait(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        check = subprocess.run(
            [sys.executable, "-m", "llmrl.cli", "serve", "--check", url], capture_output=True, check=False
        )
        if check.returncode == 0:
            return
        time.sleep(1)
    raise SystemExit(f"{url} did not come up; its log is in {assets_dir()}")


def cpu(processes: list[psutil.Process]) -> float:
    """User and system seconds of this process, and of some others with all below them."""
    total = 0.0
    for process in [psutil.Process(), *processes]:
        below = process.children(recursive=True) if process in processes else []
        for p in [process, *below]:
            with contextlib.suppress(psutil.Error):
                times = p.cpu_times()
                total += times.user + times.system
    return total


def sampling() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmrl.config.rollout import RolloutSettings
    from llmrl.models.weights import ModelWeights
    from llmrl.rollout.local import LocalEngine
    from llmrl.rollout.vllm_engine import VLLMServerEngine
    from llmrl.types import Prompt, Sampling

    path = build() / "model-small"
    tokenizer = AutoTokenizer.from_pretrained(assets_dir() / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    prompts = [
        Prompt(str(i), tuple(tokenizer(row["prompt"])["input_ids"]), row["prompt"])
        for i, row in enumerate(rows("prompts", PROMPTS))
    ]
    settings = {"stop_token_ids": ()}
    text = model.config
    described = {k: getattr(text, k) for k in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")}
    with servers(2, path) as running, tempfile.TemporaryDirectory() as directory:

        def engine(urls: list[str]) -> VLLMServerEngine:
            chosen = RolloutSettings(engine="vllm_server", urls=urls)
            return VLLMServerEngine(chosen, tokenizer, model=described, output_dir=Path(directory), **settings)

        local = LocalEngine(model, tokenizer, **settings)
        sides: dict[str, tuple[Callable[[int], int], list[psutil.Process]]] = {
            "local": (lambda step: _engine_tokens(local, prompts, Sampling(NEW_TOKENS, step=step)), []),
            "transformers generate": (lambda step: _generate(model, tokenizer, prompts), []),
        }
        engines = {}
        for count in (1, 2):
            name = f"{count} server{'s' * (count > 1)}"
            used = engines[name] = engine([url for url, _ in running[:count]])
            sides[name] = (
                lambda step, used=used: _engine_tokens(used, prompts, Sampling(NEW_TOKENS, step=step)),
                [p for _, p in running[:count]],
            )
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for round_ in range(ROUNDS + 1):  # the first one warms up
            for name, (work, processes) in sides.items():
                if name in engines:  # the other engine's weights are on the server
                    engines[name].sync_weights(ModelWeights(model), round_)
                began, used_cpu = time.perf_counter(), cpu(processes)
                tokens = work(round_)
                wall, spent = time.perf_counter() - began, cpu(processes) - used_cpu
                if round_:
                    figures[name].append((tokens / wall, tokens / max(spent, 1e-9)))
    for name, values in figures.items():
        per_second, per_cpu = (median(v[i] for v in values) for i in (0, 1))
        line = {
            "task": "rollouts/sampling",
            "side": name,
            "tokens_per_second": round(per_second),
            "tokens_per_cpu_second": round(per_cpu),
        }
        print(json.dumps(line), flush=True)


def _engine_tokens(engine, prompts, sampling) -> int:
    return sum(len(r.completion.ids) for group in engine.generate(prompts, 1, sampling) for r in group)


def _generate(model, tokenizer, prompts) -> int:
    import torch

    batch = tokenizer.pad({"input_ids": [list(p.ids) for p in prompts]}, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            **batch, do_sample=True, temperature=1.0, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, top_k=0,
            pad_token_id=tokenizer.pad_token_id, disable_compile=True,
        )  # fmt: skip
    return out[:, batch["input_ids"].shape[1] :].numel()


def overlap() -> None:
    from llmrl.algorithms.grpo import GRPOTrainer
    from llmrl.config.grpo import GRPOConfig

    path = build() / "model-small"
    table: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    with servers(1, path) as running:
        for round_ in range(ROUNDS):
            for staleness in table if round_ % 2 == 0 else reversed(table):
                with tempfile.TemporaryDirectory() as out:
                    config = GRPOConfig(
                        model_name_or_path=str(path), tokenizer_name_or_path=str(assets_dir() / "tokenizer"), output_dir=out,
                        batch_size=8, num_generations=8, max_completion_length=NEW_TOKENS, max_steps=6, learning_rate=1e-5,
                        num_samples_logged=0, rollout={"engine": "vllm_server", "urls": [running[0][0]], "max_staleness": staleness},
                    )  # fmt: skip
                    GRPOTrainer(config, train_dataset=rows("prompts", PROMPTS), reward_funcs=digit_share).train()
                    steps = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
                table[staleness] += steps[2:]  # the first ones fill the pipeline
    for staleness, steps in table.items():
        values = {
            k: median(s[name] for s in steps)
            for k, name in (("step", "step_time"), ("waited_for_rollouts", "rollout/seconds"), ("sync", "sync/seconds"))
        }
        values["training"] = values["step"] - values["waited_for_rollouts"] - values["sync"]
        line = {
            "task": "rollouts/overlap",
            "max_staleness": staleness,
            **{f"{k}_s": round(v, 3) for k, v in values.items()},
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    for task in sys.argv[1:] or ["sampling", "overlap"]:
        {"sampling": sampling, "overlap": overlap}[task]()
