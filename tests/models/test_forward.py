"""Packed equals one by one equals transformers' own forward, in log-probs and gradients, for every family."""

import pytest
import torch

from llmrl.data.packing import pack
from llmrl.errors import ConfigError
from llmrl.models.forward import PolicyModule
from llmrl.models.packing import packing_support
from tests.models.families import ONE_BY_ONE, PACKED, batch_of, config_of, distance, examples, furthest, gradients, make

T = 0.7


def objective(out, batch):
    weights = batch.select("weights").to(out.logprobs.dtype)
    return (weights * out.logprobs + 0.1 * weights.abs() * out.entropy).sum()


def run(module, batches):
    """Log-probs of all batches, end to end, and the gradients of the sum of their objectives."""
    found = []
    for batch in batches:
        out = module(batch, temperature=T, entropy=True)
        objective(out, batch).backward()
        found.append(out.logprobs.detach())
    return torch.cat(found), gradients(module)


def run_transformers(model, rows):
    """The same numbers from transformers' eager attention, one sequence at a time, with whole logits."""
    found = []
    for row in rows:
        batch = pack([row])
        logits = model(batch.input_ids[None], use_cache=False).logits[0].double() / T
        logprobs = torch.log_softmax(logits, -1)
        chosen = batch.positions()
        picked = logprobs[chosen - 1, batch.input_ids[chosen]]
        entropy = -(logprobs.exp() * logprobs).sum(-1)[chosen - 1]
        weights = batch.select("weights").double()
        (weights * picked + 0.1 * weights.abs() * entropy).sum().backward()
        found.append(picked.detach())
    return torch.cat(found), {f"model.{n}": g for n, g in gradients(model).items()}


def never_round_to_float32(monkeypatch) -> None:
    """Norms and routers of transformers round to float32 inside, and sum gradients there: in float64 that alone would be 1e-7."""

    def kept(function, position):
        def wrapped(x, *args, **kwargs):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                args = [torch.float64 if a is torch.float32 and i == position else a for i, a in enumerate(args)]
                kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            return function(x, *args, **kwargs)

        return wrapped

    monkeypatch.setattr(torch.Tensor, "to", kept(torch.Tensor.to, 0))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", kept(torch.nn.functional.softmax, 2))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family", PACKED)
def test_packed_equals_one_by_one(family, dtype, bound, monkeypatch):
    if dtype == torch.float64:
        never_round_to_float32(monkeypatch)
    module = PolicyModule(make(family, dtype))
    assert module.packing == "packed"
    rows = examples()
    packed, packed_gradients = run(module, [pack(rows)])
    single, single_gradients = run(module, [pack([row]) for row in rows])
    assert packed.dtype == dtype and distance(packed, single) < bound
    assert furthest(packed_gradients, single_gradients) < bound
    assert len(packed_gradients) == len(list(module.parameters()))


@pytest.mark.parametrize("family", [*PACKED, *ONE_BY_ONE])
def test_equals_transformers(family):
    rows = examples()
    got, got_gradients = run(PolicyModule(make(family)), [pack(rows)])
    want, want_gradients = run_transformers(make(family, attention="eager"), rows)
    assert distance(got.double(), want) < 1e-5
    assert furthest(got_gradients, want_gradients) < 1e-4


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_what_cannot_be_packed_runs_one_document_at_a_time(family):
    module = PolicyModule(make(family))
    assert module.packing == packing_support(config_of(family)) == "one_by_one"
    rows = examples()
    together, _ = run(module, [pack(rows)])
    single, _ = run(module, [pack([row]) for row in rows])
    assert distance(together, single) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "family", ["qwen2-window", "llama", "gemma2", "gemma3_text", "mistral-window", "phi", "phi3-window", "gpt2"]
)
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    module = PolicyModule(make(family)).train()
    for m in module.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    batch = batch_of()
    plain = run(module, [batch])
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    saved = run(module, [batch])
    assert any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
    assert torch.equal(plain[0], saved[0]) and furthest(saved[1], plain[1]) < 1e-6


@pytest.mark.parametrize("lengths", [(7,), (2,), (2, 2), (1, 2, 1)])
def test_few_and_short_documents(lengths):
    module = PolicyModule(make("gemma2", torch.float64))
    batch = batch_of(lengths, share=1.0)
    got, _ = run(module, [batch])
    single, _ = run(module, [pack([row]) for row in examples(lengths, 1.0) if len(row) > 1])
    assert distance(got, single) < 1e-12 and len(got) == sum(n - 1 for n in lengths)


def test_a_document_does_not_see_its_neighbours():
    module = PolicyModule(make("qwen2-window"))
    rows = examples((20, 20, 20), share=1.0)
    with torch.no_grad():
        before = module(pack(rows)).logprobs
        rows[1].input_ids[:] = 5
        after = module(pack(rows)).logprobs
    assert torch.equal(before[:19], after[:19]) and torch.equal(before[38:], after[38:])
    assert not torch.allclose(before[19:38], after[19:38])


def test_no_token_in_the_loss_still_reaches_every_parameter():
    module = PolicyModule(make("qwen2"))
    out = module(batch_of(share=0.0), entropy=True)
    assert out.logprobs.shape == (0,)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    found = gradients(module)
    assert len(found) == len(list(module.parameters())) and all(not g.any() for g in found.values())


@pytest.mark.parametrize("family", ["gemma2", "phi", "cohere"])
def test_weighted_nll_is_the_weighted_sum(family):
    module, batch = PolicyModule(make(family, torch.float64)), batch_of()
    weights = batch.select("weights")
    logprobs = module(batch, temperature=T).logprobs
    (-weights * logprobs).sum().backward()
    want = gradients(module)
    out = module(batch, temperature=T, weights=weights)
    out.loss.backward()
    assert torch.allclose(out.nll, -logprobs) and not out.nll.requires_grad
    assert furthest(gradients(module), want) < 1e-12


def test_autocast_computes_in_its_type():
    module, batch = PolicyModule(make("qwen3")), batch_of()
    exact, _ = run(module, [batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, found = run(module, [batch])
    assert rounded.dtype == torch.float32
    assert 1e-5 < distance(rounded, exact) < 0.05
    assert all(g.dtype == torch.float32 for g in found.values())


def test_the_head_gives_the_models_logits():
    for family in ("gemma2", "granite", "cohere", "phi"):
        model = make(family, attention="eager")
        ids = torch.arange(1, 9)[None]
        with torch.no_grad():
            want = model(ids).logits[0]
            module = PolicyModule(model)
            got = module.head_logits(module.backbone(input_ids=ids).last_hidden_state[0])
        assert torch.allclose(got, want, atol=1e-4)


def test_another_attention_set_later_is_refused():
    module = PolicyModule(make("llama"))
    module.model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="0 of 2 attention layers of 'llama'"):
        module(batch_of())


def test_an_output_layer_that_does_more_is_refused():
    model = make("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x).clamp(-1, 1)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.*its output layer or its attention"):
        PolicyModule(model)
    model = make("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ConfigError, match="is a Sequential"):
        PolicyModule(model)


def test_a_window_that_only_the_mask_knows_is_refused():
    model = make("mistral-window")
    model.config.sliding_window = None
    model.config.layer_types = ["sliding_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match="2 layers with a sliding window, of which 0"):
        PolicyModule(model)


@pytest.mark.parametrize(
    ("name", "word"), [("t5", "encoder-decoder"), ("gemma3", "images or sound"), ("vit", "no causal language model")]
)
def test_other_models_are_refused_by_name(name, word):
    from transformers import AutoConfig

    with pytest.raises(ConfigError, match=f"'{name}'.*{word}"):
        packing_support(AutoConfig.for_model(name))


def test_wrapping_leaves_the_model_as_it_was():
    model = make("gpt2").train()
    modes = {n: m.training for n, m in model.named_modules()}
    module = PolicyModule(model)
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert all(n.startswith("model.") for n, _ in module.named_parameters())
