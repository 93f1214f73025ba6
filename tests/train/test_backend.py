"""The optimizer step: equal however it is cut or spread, and untouched by what is not finite."""

from __future__ import annotations

import copy
import json
import math
from datetime import timedelta

import pytest
import torch
from torch import nn

from llmrl.errors import ConfigError, DivergenceError, LLMRLError
from llmrl.train.backend import Backend
from llmrl.train.collectives import Collectives, reduce_stats
from llmrl.train.launch import check_world_size, read_launch
from tests.processes import run_processes
from tests.train.toy import Toy, batches_of, empty_batch, toy_config, toy_loss


def prepared(out, module=None, total=10, **settings):
    backend = Backend(toy_config(out, **settings))
    backend.prepare(module if module is not None else Toy(), total_updates=total)
    return backend


def gradients(backend):
    """Gradients as the optimizer sees them, appended at every step."""
    seen = []
    backend.optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad.clone() for p in backend.unwrapped.parameters()])
    )
    return seen


LENGTHS = [3, 9, 1, 7, 2]
TOTAL = sum(LENGTHS)


def one_process_update(out, lengths=None, **settings):
    backend = prepared(out, max_grad_norm=0.0, **settings)
    seen = gradients(backend)
    tokens, weights = (torch.cat(parts) for parts in zip(*batches_of(LENGTHS, TOTAL)))
    cut = [(t, w) for t, w in zip(tokens.split(lengths or [TOTAL]), weights.split(lengths or [TOTAL]))]
    stats = backend.update(cut, toy_loss, empty_batch)
    return stats, seen[0]


def relative(a, b):
    return max(float((x - y).norm() / x.norm()) for x, y in zip(a, b))


def test_cuts_of_one_update_agree(tmp_path):
    whole, expected = one_process_update(tmp_path)
    cut, found = one_process_update(tmp_path, lengths=[5, 1, 16])
    assert relative(expected, found) < 1e-12
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-12)
    assert cut.sums == pytest.approx(whole.sums, rel=1e-12)
    assert whole.sums["tokens"] == TOTAL
    assert whole.sums["error/min"] < whole.sums["loss"] < whole.sums["error/max"]


def distributed_worker(out):
    backend = prepared(out, max_grad_norm=0.0, num_processes=2)
    rank = backend.rank
    seen = gradients(backend)
    batches = batches_of(LENGTHS, TOTAL)
    mine = batches[:4] if rank == 0 else batches[4:]  # 4 microbatches and 1
    stats = backend.update(mine, toy_loss, empty_batch)
    torch.save([seen[0], [p.detach() for p in backend.unwrapped.parameters()]], f"{out}/rank{rank}.pt")
    # One rank with nothing at all; then no rank with anything.
    uneven = backend.update(mine if rank == 0 else [], toy_loss, empty_batch)
    assert not uneven.skipped and uneven.sums["tokens"] == sum(LENGTHS[:4])
    nothing = backend.update([], toy_loss, empty_batch)
    assert nothing.skipped and nothing.sums == {} and backend.updates == 3
    # A NaN on one rank is skipped on both.
    before = [p.detach().clone() for p in backend.unwrapped.parameters()]
    bad = [(mine[0][0], mine[0][1] * (math.nan if rank == 1 else 1.0))]
    assert backend.update(bad, toy_loss, empty_batch).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, backend.unwrapped.parameters()))
    # So is an infinite loss on one rank whose gradient is finite.
    one_sided = poisoned("loss only") if rank == 1 else toy_loss
    assert backend.update(mine[:1], one_sided, empty_batch).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, backend.unwrapped.parameters()))
    # Scoring keeps to each rank's own batches.
    scores = backend.score(mine, lambda module, batch: module(batch[0]), empty_batch)
    assert [len(s) for s in scores] == [len(b[0]) for b in mine]
    # Collectives.
    assert backend.global_sum([1.5, rank]) == [3.0, 1.0]
    assert backend.global_sum(torch.tensor([rank + 1.0])).tolist() == [3.0]
    assert backend.global_max(rank) == 1
    everyone = backend.gather_json({"rank": rank, "text": "é" * (5 + 90 * rank), "nan": math.inf})
    assert [e["rank"] for e in everyone] == [0, 1] and len(everyone[1]["text"]) == 95
    assert everyone[0]["nan"] == math.inf
    assert backend.broadcast_json({"from": rank}) == {"from": 0}
    backend.barrier()
    # Dropout differs between ranks, initialisation did not.
    draws = backend.gather_json(torch.rand(1).item())
    assert draws[0] != draws[1]
    with open(f"{out}/stats{rank}.json", "w") as file:
        json.dump([stats.grad_norm, stats.sums, stats.learning_rate], file)
    with pytest.raises(ConfigError, match="num_processes is 3, but 2 came up"):
        Backend(toy_config(out, num_processes=3))
    unused = Toy()
    unused.extra = nn.Linear(2, 2, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"got no gradient.*extra\.weight, extra\.bias"):
        prepared(out, unused).update(mine[:1], toy_loss, empty_batch)
    if rank == 0:  # the other one never comes
        with pytest.raises(LLMRLError, match=r"(?s)can.t go on.*rank 1"):
            backend.barrier(timeout=timedelta(seconds=1))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    run_processes(distributed_worker, 2, str(tmp_path))
    whole, expected = one_process_update(tmp_path)
    for rank in range(2):
        found, parameters = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert relative(expected, found) < 1e-12
        norm, sums, rate = json.loads((tmp_path / f"stats{rank}.json").read_text())
        assert norm == pytest.approx(whole.grad_norm, rel=1e-12)
        assert sums == pytest.approx(whole.sums, rel=1e-12)
        assert rate == whole.learning_rate
        if rank == 0:
            first = parameters
    assert all(torch.equal(a, b) for a, b in zip(first, parameters))


def test_clipping(tmp_path):
    off = prepared(tmp_path, max_grad_norm=0.0)
    on = prepared(tmp_path, max_grad_norm=0.01)
    results = []
    for backend in (off, on):
        seen = gradients(backend)
        stats = backend.update(batches_of([9], 9), toy_loss, empty_batch)
        results.append((stats.grad_norm, math.sqrt(sum(float(g.square().sum()) for g in seen[0]))))
    (norm, free), (same_norm, clipped) = results
    assert norm == pytest.approx(free, rel=1e-12)
    assert norm == pytest.approx(same_norm, rel=1e-12) and norm > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)


def poisoned(kind):
    def loss(module, batch):
        value, stats = toy_loss(module, batch)
        if kind == "loss":
            return value * math.nan, stats
        if kind == "loss only":
            return value + math.inf, stats
        return value + (module.head.weight.sum() - module.head.weight.sum().detach()).abs().sqrt(), stats

    return loss


@pytest.mark.parametrize("kind", ["loss", "loss only", "gradient"])
def test_nonfinite_updates_are_skipped_then_stop(tmp_path, kind):
    backend = prepared(tmp_path, max_nonfinite_steps=2, learning_rate=0.5, warmup_steps=4)
    batch = batches_of([4], 4)
    backend.update(batch, toy_loss, empty_batch)
    backend.update(batch, toy_loss, empty_batch)
    before = copy.deepcopy((backend.unwrapped.state_dict(), backend.optimizer.state_dict()["state"]))
    rates = []
    for _ in range(2):
        stats = backend.update(batch, poisoned(kind), empty_batch)
        assert stats.skipped
        rates.append(stats.learning_rate)
    assert rates == [0.25, 0.375]  # the schedule goes on: it is a function of the update's number
    with pytest.raises(DivergenceError, match=r"update 5: .*statistics: loss .*in 3 updates in a row"):
        backend.update(batch, poisoned(kind), empty_batch)
    assert backend.skipped_updates == 3
    after = (backend.unwrapped.state_dict(), backend.optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_good_update_forgives(tmp_path):
    backend = prepared(tmp_path, max_nonfinite_steps=1)
    batch = batches_of([4], 4)
    for _ in range(3):
        assert backend.update(batch, poisoned("loss"), empty_batch).skipped
        assert not backend.update(batch, toy_loss, empty_batch).skipped


def test_padding_does_not_enter_the_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(Backend, "global_max", lambda self, value: 4)  # as if another process had four
    backend = prepared(tmp_path)
    stats = backend.update(batches_of([3, 5], 8), toy_loss, empty_batch)
    assert stats.sums["tokens"] == 8
    assert len(backend.score(batches_of([3, 5], 8), lambda module, batch: 1, empty_batch)) == 2


def test_score_has_no_gradient_and_no_dropout(tmp_path):
    backend = prepared(tmp_path, Toy(dropout=0.5))
    backend.module.norm.eval()  # a mode that someone chose
    backend.module.head.train()
    batch = batches_of([6], 6)
    a, b = (backend.score(batch, lambda module, b: module(b[0]), empty_batch)[0] for _ in range(2))
    assert torch.equal(a, b) and not a.requires_grad
    assert backend.module.head.training and not backend.module.norm.training
    losses = {backend.update(batch, toy_loss, empty_batch).sums["loss"] for _ in range(2)}
    assert len(losses) == 2


def test_bf16_autocast_keeps_float32_parameters(tmp_path):
    backend = prepared(tmp_path, Toy(dtype=torch.float32), mixed_precision="bf16")
    seen = []

    def loss(module, batch):
        out = module.head(module.embed(batch[0]))
        seen.append(out.dtype)
        return (out.squeeze(-1).float() * batch[1]).sum(), {}

    assert not backend.update(batches_of([4], 4), loss, empty_batch).skipped
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in backend.unwrapped.parameters())


def test_fp16_finds_its_scale_without_counting(tmp_path):
    backend = prepared(tmp_path, Toy(dtype=torch.float32), mixed_precision="fp16", max_nonfinite_steps=0)
    backend.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10_000)
    batch = batches_of([4], 4)
    skipped = 0
    while backend.update(batch, toy_loss, empty_batch).skipped:
        skipped += 1
    assert skipped > 0 and backend.scaler.get_scale() == 2.0 ** (127 - skipped)
    state = backend.scaler.state_dict()
    backend.gather_state()(tmp_path)
    other = prepared(tmp_path, Toy(dtype=torch.float32), mixed_precision="fp16")
    other.load_state(tmp_path)
    assert other.scaler.get_scale() == state["scale"]


def test_ten_updates_equal_five_saved_five(tmp_path):
    def run(backend, updates):
        for _ in range(updates):
            backend.update(batches_of([3, 4], 7, seed=backend.updates), toy_loss, empty_batch)

    whole = prepared(tmp_path, Toy(dropout=0.3))
    run(whole, 10)
    first = prepared(tmp_path, Toy(dropout=0.3))
    run(first, 5)
    first.gather_state()(tmp_path)
    weights = copy.deepcopy(first.unwrapped.state_dict())
    run(first, 2)  # what is lost when the process is killed
    second = prepared(tmp_path, Toy(dropout=0.3))
    second.unwrapped.load_state_dict(weights)
    second.load_state(tmp_path)
    run(second, 5)
    assert second.updates == 10
    assert all(torch.equal(a, b) for a, b in zip(whole.unwrapped.parameters(), second.unwrapped.parameters()))


def test_full_parameters(tmp_path):
    backend = prepared(tmp_path)
    stream = dict(backend.policy_weights())
    assert set(stream) == {"embed.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert not any(t.requires_grad for t in stream.values())


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "RANK": "0"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "RANK": "0"}


@pytest.mark.parametrize(
    "env, named",
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "FSDP 1; llmrl shards with FSDP2"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing: true"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "ZeRO stage 1; llmrl runs stages 2 and 3"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offloads to cpu"),
        ({**ZERO, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps: 4"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "started one process without a rank"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed precision fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "torch.compile"),
    ],
)
def test_launchers_that_ask_for_more_are_refused(tmp_path, monkeypatch, env, named):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        Backend(toy_config(tmp_path))


def test_half_precision_with_a_loss_scale_is_not_sharded():
    with pytest.raises(ConfigError, match="fp16 does not go with sharded training"):
        read_launch(FSDP, "fp16")


def test_what_a_launch_file_says():
    assert read_launch({}, "bf16").strategy == "ddp"
    offload = {
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "A,B",
    }
    fsdp = read_launch({**FSDP, **offload}, "bf16")
    assert (fsdp.strategy, fsdp.offload_params, fsdp.reshard_after_forward) == ("fsdp2", True, False)
    assert fsdp.layer_classes == ("A", "B") and read_launch(FSDP, "no").layer_classes == ()
    zero = read_launch({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "no")
    assert (zero.strategy, zero.zero) == ("zero3", {"zero_optimization": {"stage": 3}})


def test_a_deepspeed_file_keeps_what_is_not_the_recipes(tmp_path):
    file = tmp_path / "ds.json"
    env = {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    stage = {"stage": 2, "reduce_bucket_size": 1000}
    file.write_text(json.dumps({"zero_optimization": stage, "gradient_clipping": "auto", "train_batch_size": "auto"}))
    assert read_launch(env, "no").zero == {"zero_optimization": stage}
    file.write_text(json.dumps({"zero_optimization": stage, "bf16": {"enabled": True}}))
    with pytest.raises(ConfigError, match="'bf16'; the recipe decides"):
        read_launch(env, "bf16")
    file.write_text(json.dumps({"zero_optimization": stage, "gradient_clipping": 1.0}))
    with pytest.raises(ConfigError, match="max_grad_norm decides"):
        read_launch(env, "no")
    file.write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        read_launch(env, "bf16")


def test_what_accelerate_launch_sets_by_default_is_fine():
    read_launch({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, "bf16")
    check_world_size({"ACCELERATE_MIXED_PRECISION": "no"}, 1, None)
    check_world_size({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 2, None)


def test_a_silently_smaller_run_is_refused():
    # The environment that `accelerate launch --cpu --num_processes 2` gives its one process.
    alone = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(ConfigError, match="started only one"):
        check_world_size(alone, 1, None)
    check_world_size(alone, 1, 1)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but the process group has 1"):
        check_world_size({"WORLD_SIZE": "2"}, 1, None)
    with pytest.raises(ConfigError, match="num_processes is 4, but 1 came up"):
        check_world_size({}, 1, 4)


def test_reduction_by_name():
    parts = [
        {"a": [1e16, 1.0], "x/min": [3.0], "x/max": [3.0]},
        {"a": [-1e16], "x/min": [2.0], "y/max": [math.nan, 1.0]},
    ]
    out = reduce_stats(parts)
    assert (out["a"], out["x/min"], out["x/max"]) == (1.0, 2.0, 3.0)
    assert math.isnan(out["y/max"])
    assert math.isnan(reduce_stats([{"a": [math.inf, -math.inf]}])["a"])


def test_one_process_collectives_are_the_identity():
    alone = Collectives(0, 1, torch.device("cpu"))
    assert alone.global_sum([1, 2.5]) == [1.0, 2.5]
    assert alone.global_sum(torch.tensor([1.0])).dtype == torch.float64
    assert alone.gather_json({"a": 1}) == [{"a": 1}] and alone.broadcast_json(3) == 3
    alone.barrier()
