"""Every path of the packed attention against whole score matrices, and the choice between them."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl.errors import ConfigError
from llmrl.models import attention
from llmrl.models.attention import PackedLayout, choose_kernel
from tests.models.families import config_of, distance, make

LENGTHS = (3, 700, 1, 40)


def layout_of(lengths, device="cpu") -> PackedLayout:
    bounds = [0]
    for n in lengths:
        bounds.append(bounds[-1] + n)
    return PackedLayout(torch.tensor(bounds, dtype=torch.int32, device=device), tuple(bounds), max(lengths))


def tensors(lengths, heads=4, kv_heads=2, dim=8, value_dim=None, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim))
    # As models have them: a transposed view of [1, T, heads, dim].
    return [
        torch.randn(1, sum(lengths), h, d, dtype=torch.float64).to(device, dtype).transpose(1, 2).requires_grad_()
        for h, d in shapes
    ]


def whole(q, k, v, lengths, scale, window, softcap):
    """Attention by its definition: one score matrix, masked by document, order and window."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    index = torch.arange(sum(lengths), device=q.device)
    distance = index[:, None] - index
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or sum(lengths)))
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def with_gradients(out, inputs):
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weights.to(out)).sum(), inputs)]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 2, 5, 40, 600, 2000])
@pytest.mark.parametrize(("heads", "kv_heads", "value_dim", "scale"), [(4, 4, None, None), (4, 2, 12, 0.2)])
def test_equals_the_definition(window, softcap, heads, kv_heads, value_dim, scale):
    inputs = tensors(LENGTHS, heads, kv_heads, value_dim=value_dim)
    got = layout_of(LENGTHS).attend(*inputs, scale=scale, window=window, softcap=softcap)
    want = whole(*inputs, LENGTHS, scale, window, softcap)
    assert got.shape == (1, sum(LENGTHS), heads, value_dim or 8)
    assert all(distance(a, b) < 1e-13 for a, b in zip(with_gradients(got, inputs), with_gradients(want, inputs)))


def test_autocast_and_mixed_types():
    q, k, v = tensors((5, 9), dtype=torch.float32)
    half = v.detach().bfloat16()
    assert layout_of((5, 9)).attend(q, k, half, scale=None).dtype == torch.bfloat16  # norms may widen q and k alone
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layout_of((5, 9)).attend(q, k, v, scale=None).dtype == torch.bfloat16


def test_dropout_drops_and_keeps_the_mean():
    q, k, v = tensors((50, 80))
    v = torch.ones_like(v)
    for softcap in (None, 2.0):
        torch.manual_seed(0)
        out = layout_of((50, 80)).attend(q, k, v, scale=None, softcap=softcap, dropout=0.3)
        assert out.std() > 0.05 and abs(out.mean() - 1) < 0.05


def test_shapes_that_do_not_fit_the_layout_are_refused():
    q, k, v = tensors((5, 9))
    with pytest.raises(ValueError, match="must be \\[1, heads, 15, dim\\]"):
        layout_of((5, 10)).attend(q, k, v, scale=None)


def fake_varlen(record, **defaults):
    """What torch's kernel documents: q [T, H, D], a window of (left, right), here by the definition."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert q.shape[1] == k.shape[1] and cu_q is cu_k and max_q == max_k == max(LENGTHS)
        record.append(window_size)
        assert window_size[1] == 0
        window = None if window_size[0] == -1 else window_size[0] + 1
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return whole(q, k, v, LENGTHS, scale, window, None)[0]

    def with_groups(q, k, v, *args, enable_gqa=False, **kwargs):
        assert enable_gqa and q.shape[1] > k.shape[1]
        groups = q.shape[1] // k.shape[1]
        return varlen(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), *args, **kwargs)

    return varlen, with_groups


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_torch_varlen_gets_what_it_documents(monkeypatch, window, groups):
    record = []
    kernel = fake_varlen(record)[groups]
    names = {"window_size", "scale"} | ({"enable_gqa"} if groups else set())  # older torch has no enable_gqa
    monkeypatch.setattr(attention, "_varlen_accepts", lambda: frozenset(names))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(attention, "choose_kernel", lambda *a, **k: "varlen")
    inputs = tensors(LENGTHS)
    got = layout_of(LENGTHS).attend(*inputs, scale=0.3, window=window)
    want = whole(*inputs, LENGTHS, 0.3, window, None)
    assert all(distance(a, b) < 1e-13 for a, b in zip(with_gradients(got, inputs), with_gradients(want, inputs)))
    assert record == [(-1, 0) if window is None else (window - 1, 0)]


@pytest.mark.parametrize(
    ("kernel", "module"), [("flash_attn_2", "flash_attn"), ("flash_attn_3", "flash_attn_interface")]
)
def test_flash_attention_gets_what_it_documents(monkeypatch, kernel, module):
    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, **extra):
        assert causal and max_q == max(LENGTHS) and window_size == (4, 0)
        assert extra == ({"dropout_p": 0.0, "softcap": 0.0} if kernel == "flash_attn_2" else {})
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = whole(q, k, v, LENGTHS, softmax_scale, window_size[0] + 1, None)[0]
        return out if kernel == "flash_attn_2" else (out, None)  # some builds of 3 return the log-sum-exp as well

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr(attention, "choose_kernel", lambda *a, **k: kernel)
    attention._flash.cache_clear()
    inputs = tensors(LENGTHS)
    got = layout_of(LENGTHS).attend(*inputs, scale=None, window=5)
    attention._flash.cache_clear()
    assert distance(got, whole(*inputs, LENGTHS, None, 5, None)) < 1e-13


def test_a_broken_flash_attention_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    attention._flash.cache_clear()
    with pytest.raises(ConfigError, match="flash_attn is installed, but does not work here"):
        attention._flash("flash_attn_2")


@pytest.mark.parametrize(
    ("change", "installed", "want"),
    [
        ({}, {"flash_attn", "flash_attn_interface"}, "flash_attn_3"),
        ({"capability": (8, 0)}, {"flash_attn", "flash_attn_interface"}, "flash_attn_2"),
        ({"softcap": 2.0}, {"flash_attn", "flash_attn_interface"}, "flash_attn_2"),
        ({}, {"flash_attn"}, "flash_attn_2"),
        ({}, set(), "varlen"),
        ({"softcap": 2.0}, set(), "sdpa"),
        ({"dropout": 0.1}, set(), "sdpa"),
        ({"dim": 12}, set(), "sdpa"),
        ({"value_dim": 16}, {"flash_attn"}, "sdpa"),
        ({"dtype": torch.float32}, {"flash_attn"}, "sdpa"),
        ({"is_cuda": False}, {"flash_attn"}, "sdpa"),
        ({"capability": (7, 5)}, {"flash_attn"}, "sdpa"),
        ({"dim": 512, "value_dim": 512}, {"flash_attn"}, "sdpa"),
    ],
)
def test_the_choice_of_the_kernel(monkeypatch, change, installed, want):
    case = {
        "is_cuda": True, "dtype": torch.bfloat16, "dim": 64, "softcap": None, "dropout": 0.0, "capability": (9, 0), **change,
    }  # fmt: skip
    monkeypatch.setattr(attention, "_installed", lambda name: name in installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    q = SimpleNamespace(is_cuda=case["is_cuda"], dtype=case["dtype"], shape=(1, 4, 9, case["dim"]), device="cuda")
    v = SimpleNamespace(shape=(1, 4, 9, case.get("value_dim", case["dim"])))
    assert choose_kernel(q, v, softcap=case["softcap"], dropout=case["dropout"]) == want


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 5, 600])
@pytest.mark.parametrize("dim", [64, 12])
def test_cuda_kernels_equal_the_definition(dtype, window, dim):
    inputs = tensors(LENGTHS, dim=dim, dtype=dtype, device="cuda")
    got = with_gradients(layout_of(LENGTHS, "cuda").attend(*inputs, scale=None, window=window), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = with_gradients(whole(*exact, LENGTHS, None, window, None), exact)
    bound = 1e-2 if dtype == torch.float32 else 3e-2
    assert all(distance(a.double(), b) < bound for a, b in zip(got, want))


# As a plain implementation: no layout, padded batches, caches.


@pytest.mark.parametrize("family", ["qwen2-window", "gemma2", "mistral-window", "gpt2"])
def test_without_a_layout_it_is_plain_attention(family):
    eager, ours = make(family, attention="eager"), make(family, attention="llmrl")
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask}):
            a, b = eager(ids, **kwargs).logits, ours(ids, **kwargs).logits
            real = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
            assert torch.allclose(a[real], b[real], atol=1e-4)
        settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
        assert torch.equal(eager.generate(ids, **settings), ours.generate(ids, **settings))


def test_attention_sinks_are_refused_by_name():
    model = AutoModelForCausalLM.from_config(config_of("gpt_oss-sinks"), attn_implementation="eager")
    model.config._attn_implementation_internal = "llmrl"
    with pytest.raises(ConfigError, match="GptOssAttention has attention sinks"):
        model(torch.tensor([[3, 4]]))


def test_a_mask_beside_the_layout_is_refused():
    model = make("llama", attention="llmrl")
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(ConfigError, match="LlamaAttention asks for its own mask"):
        model(**batch, layout=layout_of((1, 2)))
