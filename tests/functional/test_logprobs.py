"""The chunked head against the plain one: values, gradients, types, memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmrl.functional.logprobs import MIN_ROWS, linear_logprobs, linear_weighted_nll

K, D, V = 2 * MIN_ROWS + 5, 6, 23  # three chunks when chunk_bytes is tiny


def case(dtype=torch.float64, k=K, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((k, D), (V, D), (V,)))
    targets = torch.randint(0, V, (k,), generator=g)
    weights = torch.randn(k, generator=g, dtype=torch.float64)
    leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    return *leaves, targets, weights


def plain(hidden, weight, targets, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """One row at a time, by the definition."""
    logprobs, entropies = [], []
    for h, y in zip(hidden, targets):
        z = logit_scale * (weight @ h + (0 if bias is None else bias))
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        lp = torch.log_softmax(z / temperature, -1)
        logprobs.append(lp[y])
        entropies.append(-(lp.exp() * lp).sum())
    return torch.stack(logprobs), torch.stack(entropies)


HEADS = [
    {},
    {"temperature": 0.7},
    {"softcap": 1.5},
    {"logit_scale": 0.25, "temperature": 1.3},
    {"softcap": 2.0, "logit_scale": 1.7, "temperature": 0.7},
]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_a_slow_loop(head, with_bias):
    hidden, weight, bias, targets, w = case()
    bias = bias if with_bias else None
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    lp, ent = linear_logprobs(hidden, weight, targets, bias=bias, entropy=True, chunk_bytes=1, **head)
    lp0, ent0 = plain(hidden, weight, targets, bias=bias, **head)
    torch.testing.assert_close(lp, lp0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ent, ent0, rtol=1e-12, atol=1e-12)
    for scalar, scalar0 in (
        ((w * lp).sum(), (w * lp0).sum()),
        ((w * ent).sum(), (w * ent0).sum()),
        ((w * lp + ent.square()).sum(), (w * lp0 + ent0.square()).sum()),
    ):
        got = torch.autograd.grad(scalar, leaves, retain_graph=True)
        want = torch.autograd.grad(scalar0, leaves, retain_graph=True)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradcheck(head):
    hidden, weight, bias, targets, _ = case(k=MIN_ROWS + 2)

    def f(h, w, b):
        return linear_logprobs(h, w, targets, bias=b, entropy=True, chunk_bytes=1, **head)

    assert torch.autograd.gradcheck(f, (hidden, weight, bias))


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_weighted_nll_equals_the_loss_of_the_logprobs(head, loss_type):
    hidden, weight, bias, targets, w = case()
    loss, nll = linear_weighted_nll(hidden, weight, targets, w, bias=bias, loss_type=loss_type, chunk_bytes=1, **head)
    lp, _ = plain(hidden, weight, targets, bias=bias, **head)
    want = -(w * lp * (lp.detach().exp() if loss_type == "dft" else 1.0)).sum()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nll, -lp.detach(), rtol=1e-12, atol=1e-12)
    assert not nll.requires_grad
    # 512: a loss scale, or a number of processes, reaches the gradient that was already made
    got = torch.autograd.grad(512 * loss, (hidden, weight, bias))
    for a, b in zip(got, torch.autograd.grad(512 * want, (hidden, weight, bias))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a02_mean_nll_of_two_tokens():
    # probabilities .5 and .25 of the targets: loss = (ln 2 + ln 4) / 2
    weight = torch.tensor(
        [[math.log(0.5), math.log(0.25)], [math.log(0.25), math.log(0.25)], [math.log(0.25), math.log(0.5)]]
    )
    loss, _ = linear_weighted_nll(torch.eye(2), weight, torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    assert loss.item() == pytest.approx(1.039721, abs=1e-6)


def test_softmax_policy_gradient_sums_to_zero():
    # A06: the gradient of a log-prob with respect to the logits (here: the bias) sums to 0 and is onehot - p
    hidden, weight, bias, targets, _ = case(k=1)
    lp, _ = linear_logprobs(hidden, weight, targets, bias=bias)
    (g,) = torch.autograd.grad(lp.sum(), bias)
    p = torch.softmax(hidden @ weight.t() + bias, -1)[0].detach()
    torch.testing.assert_close(g, F.one_hot(targets, V)[0] - p)
    assert abs(g.sum().item()) < 1e-14


def test_chunks_change_nothing():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        hidden, weight, bias, targets, w = case(dtype)
        results = []
        for chunk_bytes in (1, (MIN_ROWS + 3) * V * dtype.itemsize, 10**9):
            lp, ent = linear_logprobs(hidden, weight, targets, bias=bias, entropy=True, chunk_bytes=chunk_bytes)
            loss, _ = linear_weighted_nll(hidden, weight, targets, w, bias=bias, chunk_bytes=chunk_bytes)
            total = (w * lp).sum() + ent.sum() + loss
            results.append([lp, ent, *torch.autograd.grad(total, (hidden, weight, bias))])
        for other in results[1:]:
            for a, b in zip(results[0], other):
                assert (a - b).norm() <= tolerance * a.norm()


class Watch(TorchDispatchMode):
    """Records the rows of every tensor with V columns, and counts matrix products."""

    def __init__(self):
        super().__init__()
        self.rows, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.dim() == 2 and t.shape[1] == V:
                self.rows = max(self.rows, t.shape[0])
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


def test_logits_never_exist_as_a_whole_and_frozen_heads_cost_less():
    hidden, weight, _, targets, w = case(torch.float32)
    chunks = 3
    for frozen in (False, True):
        weight = weight.detach().requires_grad_(not frozen)
        with Watch() as watch:
            lp, ent = linear_logprobs(hidden, weight, targets, entropy=True, chunk_bytes=1)
            (lp.sum() + ent.sum()).backward()
        assert watch.rows == MIN_ROWS
        assert watch.products == chunks * (3 if frozen else 4)  # logits twice, gradient of hidden, gradient of weight
        with Watch() as watch:
            linear_weighted_nll(hidden, weight, targets, w, chunk_bytes=1)[0].backward()
        assert watch.rows == MIN_ROWS
        assert watch.products == chunks * (2 if frozen else 3)
        assert (weight.grad is None) == frozen
    with Watch() as watch, torch.no_grad():
        linear_weighted_nll(hidden, weight.requires_grad_(), targets, w, chunk_bytes=1)
    assert watch.products == chunks


def test_no_tokens_keep_the_graph():
    hidden, weight, bias, targets, w = case(torch.float32, k=0)
    lp, ent = linear_logprobs(hidden, weight, targets, bias=bias, entropy=True)
    loss, nll = linear_weighted_nll(hidden, weight, targets, w, bias=bias)
    assert lp.shape == ent.shape == nll.shape == (0,)
    for scalar in (lp.sum(), ent.sum(), loss):
        assert scalar.item() == 0
        for leaf, g in zip(
            (hidden, weight, bias), torch.autograd.grad(scalar, (hidden, weight, bias), retain_graph=True)
        ):
            assert g.shape == leaf.shape and not g.any()


def test_bfloat16_weights_keep_float32_softmax_and_accumulation():
    hidden, weight, bias, targets, w = case(torch.bfloat16)
    lp, ent = linear_logprobs(hidden, weight, targets, bias=bias, entropy=True, chunk_bytes=1)
    loss, nll = linear_weighted_nll(hidden, weight, targets, w, bias=bias, chunk_bytes=1)
    assert {t.dtype for t in (lp, ent, loss, nll)} == {torch.float32}
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    lp0, ent0 = plain(exact[0], exact[1], targets, bias=exact[2])
    torch.testing.assert_close(lp.double(), lp0, rtol=0.02, atol=0.02)
    torch.testing.assert_close(ent.double(), ent0, rtol=0.02, atol=0.02)
    leaves = (hidden, weight, bias)
    for scalar, scalar0 in (((w * lp).sum() + ent.sum(), (w * lp0).sum() + ent0.sum()), (loss, -(w * lp0).sum())):
        want = torch.autograd.grad(scalar0, exact, retain_graph=True)
        for a, b in zip(torch.autograd.grad(scalar, leaves), want):
            assert a.dtype == torch.bfloat16
            assert (a - b).norm() < 0.02 * b.norm()


def test_autocast_is_followed_and_backward_may_run_inside_or_outside():
    hidden, weight, bias, targets, w = case(torch.float32)
    grads = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            lp, ent = linear_logprobs(hidden, weight, targets, bias=bias, entropy=True)
            loss, _ = linear_weighted_nll(hidden, weight, targets, w, bias=bias)
            total = (w * lp).sum() + ent.sum() + loss
            if inside:
                grads.append(torch.autograd.grad(total, (hidden, weight, bias)))
        if not inside:
            grads.append(torch.autograd.grad(total, (hidden, weight, bias)))
    assert lp.dtype == torch.float32
    explicit, _ = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, bias=bias)
    torch.testing.assert_close(lp, explicit, rtol=0, atol=0)
    assert not torch.equal(lp, linear_logprobs(hidden, weight, targets, bias=bias)[0])
    for a, b in zip(*grads):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_half_precision_gradients_survive_tiny_weights():
    # weights near 1 / (tokens of an update) would underflow in float16 products
    hidden, weight, _, targets, _ = case(torch.float16)
    w = torch.full((K,), 1e-7)
    loss, _ = linear_weighted_nll(hidden, weight, targets, w)
    got, _ = torch.autograd.grad(2.0**16 * loss, (hidden, weight))
    exact = hidden.detach().double().requires_grad_()
    lp, _ = plain(exact, weight.detach().double(), targets)
    (want,) = torch.autograd.grad(-(2.0**16) * (w * lp).sum(), exact)
    assert (got - want).norm() < 0.01 * want.norm()


def test_a_second_backward_is_refused():
    hidden, weight, _, targets, w = case()
    loss, _ = linear_weighted_nll(hidden, weight, targets, w)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        loss.backward()


def test_large_logits_stay_finite():
    hidden, weight, _, targets, w = case(torch.float32)
    with torch.no_grad():
        hidden.mul_(1e3)
    lp, ent = linear_logprobs(hidden, weight, targets, entropy=True)
    loss, _ = linear_weighted_nll(hidden, weight, targets, w)
    grads = torch.autograd.grad(lp.sum() + ent.sum() + loss, (hidden, weight))
    assert all(t.isfinite().all() for t in (lp, ent, *grads))


def test_other_rows_do_not_leak():
    # a NaN in one row's hidden state, which the caller did not weigh, must be selected away; what is selected is not touched by it
    hidden, weight, _, targets, _ = case()
    poisoned = hidden.detach().clone()
    poisoned[3] = torch.nan
    keep = torch.arange(K) != 3
    poisoned.requires_grad_()
    lp, _ = linear_logprobs(poisoned[keep], weight, targets[keep])
    g_hidden, g_weight = torch.autograd.grad(lp.sum(), (poisoned, weight))
    assert lp.isfinite().all() and g_weight.isfinite().all() and not g_hidden[3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"bias": torch.zeros(V + 1)}, "bias"),
        ({"targets": torch.zeros(K + 1, dtype=torch.long)}, "targets"),
    ],
)
def test_bad_input_is_refused(change, message):
    hidden, weight, _, targets, w = case(torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_logprobs(hidden, weight, **{"targets": targets, **change})
    with pytest.raises(ValueError, match="loss_type"):
        linear_weighted_nll(hidden, weight, targets, w, loss_type="mse")
    with pytest.raises(ValueError, match="weights"):
        linear_weighted_nll(hidden, weight, targets, w[:-1])
