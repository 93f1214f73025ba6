"""vLLM inside a training process. It is run in processes of its own: what it does to a process must not reach other tests.

This file is also the script that those processes run; it prints what it saw as JSON.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llmrl.config.rollout import RolloutSettings
from llmrl.errors import ConfigError
from llmrl.types import Prompt, Sampling

STOPS = (5, 9, 11)
MAX_LEN = 384
SAMPLING = Sampling(24, temperature=0.7, seed=3, step=1)
PROMPTS = [Prompt("long", tuple(i % 200 + 20 for i in range(300)), "")] + [
    Prompt(str(i), tuple(range(20 + i, 30 + 2 * i)), "") for i in range(7)
]


def settings(**changes):
    return RolloutSettings(engine="vllm_colocate", **{"vllm_args": {"kv_cache_memory_bytes": 2**27}, **changes})


# ---- what runs beside vLLM ----


def process_state() -> dict:
    """The global state that a trainer depends on, as far as it can be read."""
    numpy_state = np.random.get_state()
    return {
        "torch": hash(torch.get_rng_state().numpy().tobytes()),
        "numpy": hash((numpy_state[1].tobytes(), *numpy_state[2:])),
        "python": hash(random.getstate()),
        "threads": torch.get_num_threads(),
        "functions": {
            f"{owner.__name__}.{name}": str(getattr(owner, name))
            for owner in (
                torch,
                torch.Tensor,
                torch.cuda,
                torch.accelerator,
                torch.nn.functional,
                dist,
                gc,
                random,
                signal,
            )
            for name in dir(owner)
            if callable(getattr(owner, name, None)) and not isinstance(getattr(owner, name), type(torch))
        },
        "group": dist.is_initialized(),
        "environment": hash(tuple(sorted(os.environ.items()))),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
        "dtype": str(torch.get_default_dtype()),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "modes": [torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        "frozen": gc.get_freeze_count(),
        "logging": [logging.getLogger().level, len(logging.getLogger().handlers), logging.root.manager.disable],
    }


def load(directory: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(directory).float(), AutoTokenizer.from_pretrained(directory)


def shake(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)


def gap(model, groups, temperature: float = SAMPLING.temperature) -> float:
    """The largest |sampled - recomputed| log-prob, by a forward of transformers."""
    worst = 0.0
    for rollout in (r for group in groups for r in group):
        ids = torch.tensor([rollout.prompt.ids + rollout.completion.ids])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0].double() / temperature, -1)
        n = len(rollout.prompt.ids)
        exact = logprobs[n - 1 : -1].gather(1, ids[0, n:, None]).squeeze(1)
        worst = max(worst, float((exact - torch.tensor(rollout.completion.sampled_logprobs)).abs().max()))
    return worst


def raised(action) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def tokens(groups) -> list:
    return [[r.completion.ids for r in group] for group in groups]


def train(directory: Path, between=lambda model, step: None) -> list[str]:
    """Three steps with dropout on random data; the bytes of all parameters afterwards, and the losses."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(directory, attention_dropout=0.2).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        between(model, step)
        ids = torch.randint(20, 200, (4, 32))
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses + [str(hash(p.detach().numpy().tobytes())) for p in model.parameters()]


class Stream:
    """`PolicyWeights` of a model, changed on the way by `change(name, tensor)`: None leaves a tensor out."""

    adapter_rank = None

    def __init__(self, model, change=lambda name, tensor: tensor) -> None:
        self.model, self.change = model, change
        self.given = 0

    def __iter__(self):
        for name, parameter in self.model.named_parameters():
            self.given += 1
            if (changed := self.change(name, parameter.detach())) is not None:
                yield name, changed


def make_engine(directory: Path, tokenizer, given: RolloutSettings, **more):
    from llmrl.rollout.vllm_colocate import ColocatedEngine

    bare = Path(tempfile.mkdtemp())  # without weights, and gone when the engine is made, as the trainer does it
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, bare)
    try:
        return ColocatedEngine(
            given, tokenizer, stop_token_ids=STOPS, model_path=str(bare), max_model_len=MAX_LEN, seed=0, **more
        )
    finally:
        shutil.rmtree(bare)


def alone(directory: Path) -> dict:
    """One training process."""
    seen: dict = {"trained": [train(directory)]}
    model, tokenizer = load(directory)
    import rich.style  # noqa: F401 - draws a number when it is first imported, which every trainer has done

    before = process_state()

    def note(name: str) -> None:
        after = process_state()
        functions = before["functions"], after.pop("functions")
        seen[f"changed {name}"] = {k: [before[k], after[k]] for k in after if before[k] != after[k]} | {
            k: [was, functions[1].get(k)] for k, was in functions[0].items() if functions[1].get(k) != was
        }

    engine = make_engine(directory, tokenizer, settings())
    note("by the start")
    seen["early"] = raised(lambda: engine.generate(PROMPTS, 1, SAMPLING))
    for version in (1, 2):
        report = engine.sync_weights(Stream(model), version)
        groups = engine.generate(PROMPTS, 4, SAMPLING)
        seen[f"gap {version}"] = gap(model, groups)
        shake(model, version)
    note("by sampling")
    names = list(dict(model.named_parameters()))
    seen["tensors"] = len(names)
    seen["report"] = [report.version, report.count == len(names), report.bytes, report.digest]
    seen["completions"] = [
        [r.prompt.id, r.index, r.completion.ids, r.completion.finish_reason, r.completion.text, r.completion.version]
        for group in groups
        for r in group
    ]
    seen["decoded"] = [
        tokenizer.decode(ids[:-1] if reason == "stop" else ids, skip_special_tokens=True)
        for _, _, ids, reason, _, _ in seen["completions"]
    ]
    seen["again"] = tokens(engine.generate(PROMPTS, 4, SAMPLING)) == tokens(groups)
    seen["alone"] = tokens(engine.generate(PROMPTS[3:4], 4, SAMPLING)) == tokens(groups)[3:4]
    seen["next step"] = tokens(engine.generate(PROMPTS, 4, Sampling(24, 0.7, seed=3, step=2))) == tokens(groups)
    seen["greedy"] = tokens(engine.generate(PROMPTS[:2], 3, Sampling(8, 0.0)))
    probe = engine.probe(PROMPTS[0].ids, SAMPLING)
    seen["probe"] = [len(probe), len(probe[0].ids)]
    streaming(engine, seen)
    refusals(engine, directory, tokenizer, seen)
    proofs(engine, model, names, seen)

    def between(trained, step: int) -> None:
        engine.sync_weights(Stream(trained), 10 + step)
        engine.generate(PROMPTS, 2, SAMPLING)
        engine.verify()
        engine.rest()

    seen["trained"].append(train(directory, between))
    engine.close()
    engine.close()
    seen["closed"] = raised(lambda: engine.generate(PROMPTS, 1, SAMPLING))
    seen["unknown"] = raised(lambda: make_engine(directory, tokenizer, settings(vllm_args={"no_such_thing": 1})))
    second = make_engine(directory, tokenizer, settings())
    second.sync_weights(Stream(model), 7)
    seen["gap of a second engine"] = gap(model, second.generate(PROMPTS, 2, SAMPLING))
    second.close()
    seen["group after close"] = dist.is_initialized()
    return seen


def streaming(engine, seen: dict) -> None:
    """Groups of one token and of many in one call: the short ones must arrive while the long ones still run."""
    calls = []

    def on_group(place, group):
        calls.append([place, engine._engine.get_num_unfinished_requests(), dist.is_initialized(), len(group)])

    stops, engine.stop_token_ids = engine.stop_token_ids, frozenset(range(0, 200))
    groups = engine.generate(PROMPTS, 2, Sampling(40, temperature=1.5, seed=1), on_group)
    engine.stop_token_ids = stops
    seen["stream"] = {"calls": calls, "lengths": [max(len(r.completion.ids) for r in g) for g in groups]}

    def fails(place, group):
        raise ValueError("reward failed")

    seen["stream fails"] = raised(lambda: engine.generate(PROMPTS, 2, SAMPLING, fails))
    seen["left running"] = engine._engine.get_num_unfinished_requests()


def refusals(engine, directory: Path, tokenizer, seen: dict) -> None:
    def asked(ids, sampling=SAMPLING, n=1):
        return raised(lambda: engine.generate([Prompt("p", tuple(ids), "")], n, sampling))

    seen["refused"] = {
        "empty": asked([]),
        "long": asked([20] * MAX_LEN),
        "vocabulary": asked([100_000]),
        "none": asked([20], n=0),
        "cold": asked([20], Sampling(4, temperature=0.001)),
        "second": raised(lambda: make_engine(directory, tokenizer, settings())),
    }


def proofs(engine, model, names: list[str], seen: dict) -> None:
    """Faults of a sync: each is found, the engine samples nothing until a whole sync, and that one is right again."""

    def broken(name, tensor):
        if name == names[5]:
            raise OSError("gather failed")
        return tensor

    faults = {
        "withheld": lambda n, t: None if n == names[4] else t,
        "altered": lambda n, t: t + 0.5 if n == names[3] else t,
        "shape": lambda n, t: t[:-1] if n == names[6] else t,
        "raises": broken,
        "unknown": lambda n, t: t,
    }
    shake(model, 5)
    for fault, change in faults.items():
        shake(model, 6)
        stream = Stream(model, change)
        if fault == "altered":  # between the count and the load, as a bad copy would
            load_weights = engine._engine.model_executor.driver_worker.worker.model_runner.model.load_weights
            target = engine._engine.model_executor.driver_worker.worker.model_runner.model
            target.load_weights = lambda weights, f=load_weights, c=change: f((n, c(n, t)) for n, t in weights)
            error = raised(lambda s=model: engine.sync_weights(Stream(s), 3))
            del target.load_weights
        elif fault == "unknown":
            extra = Stream(model)
            extra.model = type(
                "Odd", (), {"named_parameters": lambda self, m=model: [*m.named_parameters(), ("x.y", torch.ones(2))]}
            )()
            error = raised(lambda s=extra: engine.sync_weights(s, 3))
        else:
            error = raised(lambda s=stream: engine.sync_weights(s, 3))
        refused = raised(lambda: engine.generate(PROMPTS[:1], 1, SAMPLING))
        engine.sync_weights(Stream(model), 4)
        recovered = gap(model, engine.generate(PROMPTS, 2, SAMPLING))
        seen[f"fault {fault}"] = [error, refused, recovered, stream.given]

    def overwrite(held):
        with torch.no_grad():
            next(held.parameters()).add_(0.25)

    engine.verify()
    engine._engine.apply_model(overwrite)
    seen["overwritten"] = [raised(engine.verify), raised(lambda: engine.generate(PROMPTS[:1], 1, SAMPLING))]


def together(directory: Path) -> dict:
    """One of two training processes with a gloo group: first each has a copy of the model, then they share one."""
    dist.init_process_group("gloo")
    every: list = [None, None]
    dist.all_gather_object(every, {size: of_two(directory, size) for size in (1, 2)})
    rank = dist.get_rank()
    dist.destroy_process_group()
    return {"every": every} if rank == 0 else {}


def of_two(directory: Path, size: int) -> dict:
    rank, group, local = dist.get_rank(), dist.group.WORLD, os.environ["LOCAL_WORLD_SIZE"]
    model, tokenizer = load(directory)
    engine = make_engine(directory, tokenizer, settings(tensor_parallel_size=size), rank=rank, world_size=2)
    mine = PROMPTS[:3] if rank == 0 else PROMPTS[3:]
    seen: dict = {}
    for version in (1, 2):
        engine.sync_weights(Stream(model), version)
        groups = engine.generate(mine, 2, SAMPLING)
        seen[f"gap {version}"] = gap(model, groups)
        engine.verify()
        shake(model, version)
    seen["prompts"] = [g[0].prompt.id for g in groups] == [p.id for p in mine]
    if size == 1 and rank == 0:
        seen["alone"] = len(engine.generate(mine, 1, SAMPLING))
    engine.close()
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    seen["sum after close"] = total.item()
    seen["same group"] = dist.group.WORLD is group and os.environ["LOCAL_WORLD_SIZE"] == local
    return seen


# ---- the tests ----

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


def run(command: list[str], directory: Path, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, *command, __file__, str(directory), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert done.returncode == 0 and len(lines) == 1, (done.stdout[-3000:], done.stderr[-6000:])
    return json.loads(lines[0].removeprefix("SEEN "))


@pytest.fixture(scope="module")
def seen(vllm_model) -> dict:
    return run([], vllm_model, "alone")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm_args": {"logprobs_mode": "raw_logprobs"}}, "logprobs_mode"),
        ({"vllm_args": {"worker_extension_cls": "a.B"}}, "worker_extension_cls"),
        ({"vllm_args": {"enable_lora": True}}, "merged"),
        ({"vllm_args": {"gpu_memory_utilization": 0.5}}, "rollout.gpu_memory_utilization"),
        ({"tensor_parallel_size": 2}, "does not divide"),
    ],
)
def test_arguments_that_would_break_the_engine(changes, message, tmp_path):
    from llmrl.rollout.vllm_colocate import ColocatedEngine

    with pytest.raises(ConfigError, match=message):
        ColocatedEngine(
            settings(**changes), None, stop_token_ids=STOPS, model_path=str(tmp_path), max_model_len=None, seed=0
        )


@needs_vllm
@pytest.mark.slow
class TestOneProcess:
    def test_the_process_is_as_it_was(self, seen):
        assert seen["changed by the start"] == {}
        assert seen["changed by sampling"] == {}
        assert not seen["group after close"]

    def test_training_gives_the_same_bits_with_and_without_it(self, seen):
        without, beside = seen["trained"]
        assert without == beside

    def test_logprobs_are_those_of_the_weights_that_were_sent(self, seen):
        assert seen["gap 1"] < 1e-5
        assert seen["gap 2"] < 1e-5

    def test_nothing_is_sampled_before_weights_came(self, seen):
        assert seen["early"].startswith("SyncError")

    def test_the_report(self, seen):
        version, all_of_them, size, digest = seen["report"]
        assert (version, all_of_them) == (2, True)
        assert size > 0 and int(digest, 16) != 0

    def test_completions(self, seen):
        completions = seen["completions"]
        assert [c[:2] for c in completions] == [[p.id, i] for p in PROMPTS for i in range(4)]
        assert {c[3] for c in completions} == {"stop", "length"}
        for _, _, ids, reason, _, version in completions:
            body = ids[:-1] if reason == "stop" else ids
            assert not set(body) & set(STOPS)
            assert (ids[-1] in STOPS) if reason == "stop" else len(ids) == SAMPLING.max_tokens
            assert version == 2
        assert [c[4] for c in completions] == seen["decoded"]
        groups = [completions[i : i + 4] for i in range(0, len(completions), 4)]
        assert all(len({tuple(c[2]) for c in group}) == 4 for group in groups)

    def test_seeds(self, seen):
        assert seen["again"]
        assert seen["alone"], "what else is sampled must not matter"
        assert not seen["next step"]

    def test_greedy_groups_are_one_completion(self, seen):
        assert [len(group) for group in seen["greedy"]] == [3, 3]
        assert all(group[0] == ids for group in seen["greedy"] for ids in group)

    def test_probe(self, seen):
        assert seen["probe"][0] == 1
        assert seen["probe"][1] >= 1

    def test_groups_come_as_they_finish_and_outside_of_vllm(self, seen):
        calls = seen["stream"]["calls"]
        assert sorted(c[0] for c in calls) == list(range(len(PROMPTS)))
        lengths = seen["stream"]["lengths"]
        assert [lengths[c[0]] for c in calls] == sorted(lengths)
        assert len(set(lengths)) > 1
        assert calls[0][1] > 0, "the first group arrives while others run"
        assert all(not initialised and size == 2 for _, _, initialised, size in calls)

    def test_a_failing_reward_leaves_nothing_running(self, seen):
        assert seen["stream fails"] == "ValueError: reward failed"
        assert seen["left running"] == 0

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("empty", "no tokens"),
            ("long", "max_model_len"),
            ("vocabulary", "vocabulary"),
            ("none", "num_generations=0"),
            ("cold", "temperature 0.001"),
            ("second", "close"),
        ],
    )
    def test_refusals(self, seen, what, message):
        error = seen["refused"][what]
        assert message in error
        assert error.startswith("ConfigError" if what == "second" else "RolloutError")

    @pytest.mark.parametrize("fault", ["withheld", "altered", "shape", "raises", "unknown"])
    def test_faults_of_a_sync(self, seen, fault):
        error, refused, recovered, given = seen[f"fault {fault}"]
        assert error.startswith("SyncError")
        assert refused.startswith("SyncError")
        assert recovered < 1e-5
        if fault in ("withheld", "shape"):
            assert given == seen["tensors"], "other processes may take part in the stream, so it is read to its end"

    def test_weights_that_something_else_wrote(self, seen):
        verified, refused = seen["overwritten"]
        assert "no longer those of sync 4" in verified
        assert refused.startswith("SyncError")

    def test_the_end(self, seen):
        assert seen["closed"].startswith("RolloutError")
        assert "no_such_thing" in seen["unknown"] and seen["unknown"].startswith("ConfigError")
        assert seen["gap of a second engine"] < 1e-5


@pytest.fixture(scope="module")
def seen_by_two(vllm_model) -> list[dict]:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
    ]
    return run(launcher, vllm_model, "together")["every"]


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("size", ["1", "2"], ids=["a copy each", "a shared copy"])
def test_two_processes(seen_by_two, size):
    for seen in (process[size] for process in seen_by_two):
        assert max(seen["gap 1"], seen["gap 2"]) < 1e-5
        assert seen["prompts"]
        assert seen["sum after close"] == 3.0
        assert seen["same group"]
        assert seen.get("alone", 3) == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "alone":
        result = alone(Path(sys.argv[1]))
    else:
        result = together(Path(sys.argv[1]))
    if result:
        print("SEEN " + json.dumps(result), flush=True)
