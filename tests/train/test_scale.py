"""Plans for many GPUs against numbers worked out by hand."""

from __future__ import annotations

import pytest

from llmrl.config.grpo import GRPOConfig
from llmrl.config.model import ModelFields
from llmrl.config.sft import SFTConfig
from llmrl.errors import ConfigError
from llmrl.models.known import named_shape
from llmrl.train.gpus import GPUS, find_gpu
from llmrl.train.scale import SHARDINGS, Load, counts, sharded_memory, smallest, usable
from llmrl.train.step_time import (
    Assumed,
    Engine,
    Part,
    Work,
    cache_bytes_per_token,
    collective_seconds,
    decode_step,
    generation,
    matmul_parameters,
    rows_at_once,
    step_time,
    sync,
    total,
    update_flops,
)

BASE = {"model_name_or_path": "m", "output_dir": "o", "mixed_precision": "bf16", "gradient_checkpointing": True}
H100 = find_gpu("h100-80g")
BY = {s.name: s for s in SHARDINGS}
ASSUMED = Assumed(mfu=0.4, decode_efficiency=0.6)
N = 70_553_706_496  # parameters of llama-70b; 141.1 GB in bf16
# q and o 8192 x 8192, k and v 8192 x 1024, three MLP matrices 8192 x 28672, two norms
LAYER = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
VOCABULARY = 128_256 * 8192  # the embedding, and again the head


@pytest.fixture(scope="module")
def llama70b():
    return named_shape(ModelFields(model_name_or_path="llama-70b"))


@pytest.fixture(scope="module")
def llama8b():
    return named_shape(ModelFields(model_name_or_path="llama-8b"))


def _terms(shape, sharding, gpus, config=None, **load):
    config = config or SFTConfig(**BASE)
    memory = sharded_memory(config, shape, Load(microbatch_tokens=1000, **load), BY[sharding], gpus)
    return {t.name: t.bytes for t in memory.terms}, memory.peak


def test_the_shape_is_the_one_of_the_hand_computations(llama70b):
    assert (llama70b.parameters, llama70b.layer_parameters, llama70b.embedding) == (N, LAYER, VOCABULARY)
    assert pytest.approx(141.1e9, rel=1e-3) == 2 * N
    assert matmul_parameters(llama70b) == 80 * LAYER + VOCABULARY == 69_503_025_152


def test_ddp_holds_everything(llama70b):
    terms, peak = _terms(llama70b, "ddp", 64)
    # float32 weights 4, gradients 4, two moments 8 = 16 bytes a parameter: 1129 GB; and autocast's 16-bit copies
    assert terms["weights"] + terms["gradients"] + terms["optimizer"] == 16 * N
    assert terms["autocast"] == 2 * (N - VOCABULARY)
    assert _terms(llama70b, "ddp", 8) == (terms, peak)


OUTSIDE = 2 * VOCABULARY + 8192  # embedding, head and last norm


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_full_sharding_divides_by_all_gpus(llama70b, name):
    terms, _ = _terms(llama70b, name, 64)
    # 16 N / 64 = 17.6 GB
    assert terms["weights"] + terms["gradients"] + terms["optimizer"] == pytest.approx(17.638e9, rel=1e-4)
    # What is outside of layers and one layer's gradients in float32; two layers, in 16 bits where FSDP2 gathers them
    layer = 2 if name == "fsdp2" else 4
    assert terms["gathered layers"] == 2 * LAYER * layer + OUTSIDE * 4 + LAYER * 4


def test_copies_of_autocast_under_sharding(llama70b):
    assert "autocast" not in _terms(llama70b, "fsdp2", 64)[0]
    for checkpointing, copies in ((True, 2 * 2 * LAYER), (False, 2 * (N - VOCABULARY))):
        config = SFTConfig(**{**BASE, "gradient_checkpointing": checkpointing})
        assert _terms(llama70b, "zero3", 64, config)[0]["autocast"] == copies


def test_hybrid_sharding_divides_by_a_machine(llama70b):
    terms, _ = _terms(llama70b, "fsdp2-hybrid", 64)
    assert terms["weights"] + terms["gradients"] + terms["optimizer"] == 16 * N // 8  # 141 GB


def test_zero2_keeps_weights(llama70b):
    terms, _ = _terms(llama70b, "zero2", 64)
    assert terms["weights"] == 4 * N
    assert terms["autocast"] == 2 * (N - VOCABULARY)
    assert terms["master weights"] == 4 * N // 64
    assert terms["optimizer"] + terms["gradients"] == 12 * N // 64


def test_adapters_need_no_moments_of_the_base():
    shape = named_shape(ModelFields(model_name_or_path="llama-1b", lora={"r": 16}))
    terms, _ = _terms(shape, "ddp", 8, SFTConfig(**BASE, lora={"r": 16}))
    assert terms["optimizer"] == 8 * shape.trainable < terms["weights"] / 20


def test_reference_and_engine(llama70b):
    config = GRPOConfig(**BASE, rewards="f")  # beta 0.04
    terms, peak = _terms(llama70b, "fsdp2", 64, config, engine_bytes=10**12)
    assert terms["reference"] == terms["weights"] == 4 * N // 64
    always = terms["weights"] + terms["optimizer"] + terms["reference"]
    assert peak == always + 10**12  # gradients and activations are gone while vLLM samples
    _, held = _terms(llama70b, "fsdp2", 64, config, engine_bytes=10**12, engine_phase="always")
    moment = max(terms["head"] + terms["head's gradient"], terms["a layer"])
    assert held == peak + sum(terms[n] for n in ("gradients", "gathered layers", "activations")) + moment


@pytest.mark.parametrize("name", list(BY))
def test_more_gpus_never_need_more_memory_each(llama70b, name):
    peaks = [_terms(llama70b, name, gpus)[1] for gpus in counts(H100) if 2 <= gpus <= 512]
    assert peaks == sorted(peaks, reverse=True)


def test_the_smallest_number_of_gpus(llama70b):
    def peak_at(gpus):
        return _terms(llama70b, "fsdp2", gpus)[1]

    least = smallest(H100, peak_at)
    assert least % 8 == 0
    assert peak_at(least) <= usable(H100) < peak_at(least - 8)
    assert smallest(H100, lambda gpus: _terms(llama70b, "ddp", gpus)[1]) is None


def test_operations_of_an_update(llama70b):
    # 8 N with the second forward, and attention 4 x 2 x 80 layers x 8192 wide x 8192 long: 5.99e11 a token
    assert update_flops(llama70b, 1, 8192, checkpointing=True) == pytest.approx(
        8 * 69_503_025_152 + 8 * 80 * 8192 * 8192
    )
    assert update_flops(llama70b, 1, 0, checkpointing=False) == 6 * 69_503_025_152
    adapted = named_shape(ModelFields(model_name_or_path="llama-1b", lora={"r": 16}))
    share = adapted.trainable / adapted.parameters
    assert update_flops(adapted, 1, 0, checkpointing=False) == pytest.approx(
        (4 + 2 * share) * matmul_parameters(adapted)
    )


def test_an_update_takes_what_its_operations_take(llama70b):
    work = Work(64 * 8192, 8192, 1 / 64, microbatches=1, updates=1, checkpointing=True)
    (update,) = step_time(llama70b, work, BY["fsdp2"], H100, 64, ASSUMED)
    # 8192 tokens a GPU x 5.99e11 / (0.4 x 989.4e12) = 12.4 s; gathers and reductions, 8 N bytes at 0.7 x 400 GB/s, 2.0 s, are hidden
    assert update == Part("update", pytest.approx(12.398, rel=1e-3), "matmuls")
    many = Work(64 * 8192, 8192, 1 / 64, microbatches=8, updates=1, checkpointing=True)
    (slow,) = step_time(llama70b, many, BY["fsdp2"], H100, 64, ASSUMED)
    assert slow == Part("update", pytest.approx(8 * 8 * N * 63 / 64 / 280e9, rel=1e-6), "communication")


def test_collectives():
    # 315 of 450 GB/s within a machine; between machines eight cards of 50 GB/s, 280 GB/s
    assert collective_seconds(315e9, 8, H100) == pytest.approx(7 / 8)
    assert collective_seconds(280e9, 16, H100) == pytest.approx(15 / 16)
    assert collective_seconds(1e9, 1, H100) == 0


def test_a_decode_step(llama70b):
    assert cache_bytes_per_token(llama70b) == 2 * 80 * 1024 * 2 == 327_680
    # read (139.0 GB of weights + 64 x 1000 x 327,680 B of cache) / 4 at 0.6 x 3.35 TB/s: 19.90 ms
    # 160 all-reduces: 10 us + 2 x 1 MiB x 3/4 / 315 GB/s = 15.0 us each, 2.40 ms; 2 ms besides
    seconds, bound = decode_step(llama70b, 64, 1000, 4, H100, ASSUMED)
    assert (seconds, bound) == (pytest.approx(24.30e-3, rel=1e-3), "memory bandwidth")
    assert decode_step(llama70b, 1000, 10, 4, H100, ASSUMED)[1] == "matmuls"


def test_generation_in_rounds_and_the_longest_alone(llama8b):
    work = Work(
        0, 0, 1.0, 1, 1, rollouts=64, prompts=8, prompt_tokens=100, completion_tokens=200, completion_limit=1000
    )
    engine = Engine("vllm_server", 4, 1, 8 * 300 * cache_bytes_per_token(llama8b))
    assert rows_at_once(llama8b, work, engine) == 8  # of the 16 completions that each of 4 copies makes: two rounds
    one = decode_step(llama8b, 8, 200, 1, H100, ASSUMED)[0]
    last = decode_step(llama8b, 1, 1100, 1, H100, ASSUMED)[0]
    prefill = (2 * matmul_parameters(llama8b) * 800 + 2 * 32 * 4096 * 100 * 800) / (4 * 0.4 * 989.4e12)
    assert generation(llama8b, work, engine, H100, ASSUMED).seconds == pytest.approx(
        prefill + 2 * 200 * one + 800 * last
    )
    short = Engine("vllm_server", 4, 1, 1000 * cache_bytes_per_token(llama8b))
    assert rows_at_once(llama8b, work, short) == 0  # one of full length does not fit


def test_sync_and_sampling_ahead(llama70b):
    adapted = named_shape(ModelFields(model_name_or_path="llama-1b", lora={"r": 16}))
    server = Engine("vllm_server", 8, 4, 0, ahead=True)
    assert sync(adapted, server, BY["ddp"], H100, 8).seconds == pytest.approx(2 * 2 * adapted.trainable / 2e9)
    # 141 GB over one card at 0.7 x 50 GB/s: 4.03 s
    nccl = Engine("vllm_server", 8, 4, 0, transfer="nccl")
    assert sync(llama70b, nccl, BY["ddp"], H100, 8).seconds == pytest.approx(4.03, rel=1e-3)
    local = Engine("local", 8, 1, 0, rows=8)
    assert sync(llama70b, local, BY["ddp"], H100, 8).seconds == 0
    # 4 bytes a parameter, 282 GB, 7/8 of them over links of 315 GB/s
    assert sync(llama70b, local, BY["fsdp2"], H100, 8).seconds == pytest.approx(4 * N * 7 / 8 / 315e9)
    parts = [Part("generation", 5.0, ""), Part("update", 3.0, ""), Part("sync", 1.0, "")]
    assert (total(parts, server), total(parts, nccl)) == (5.0, 9.0)


@pytest.mark.parametrize(
    ("name", "gpus", "copy", "tokens", "seconds"),  # NeMo RL with Megatron, two clusters' mean: docs/scale.md
    [("llama8b", 8, 1, 795, 114), ("llama70b", 64, 4, 398, 162)],
)
def test_published_steps_are_met_within_half(name, gpus, copy, tokens, seconds, request):
    shape = request.getfixturevalue(name)
    work = Work(
        2048 * (tokens + 110), tokens + 110, 1 / gpus, 8, 4, scored=1, referenced=1, checkpointing=True,
        rollouts=2048, prompts=64, prompt_tokens=110, completion_tokens=tokens, completion_limit=3986,
    )  # fmt: skip
    engine = Engine("vllm_colocate", gpus, copy, int(0.6 * H100.memory * copy) - 2 * shape.parameters)
    ours = total(step_time(shape, work, BY["fsdp2"], H100, gpus, ASSUMED, engine))
    assert seconds / 1.5 < ours < seconds * 1.5


def test_gpus_by_name():
    assert find_gpu("H100") is GPUS["h100-80g"]
    assert find_gpu("4090") is GPUS["rtx4090-24g"]
    with pytest.raises(ConfigError, match=r"several.*a100-40g"):
        find_gpu("a100")
    with pytest.raises(ConfigError, match="unknown"):
        find_gpu("v100")
