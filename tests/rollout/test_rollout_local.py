"""The local engine against transformers' own generate and against plain forwards."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmrl.errors import RolloutError
from llmrl.models.forward import PolicyModule
from llmrl.rollout.local import LocalEngine
from llmrl.types import Prompt, Sampling

VOCAB = 96
STOPS = tuple(range(3, 12))
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.25, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "llama": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 9, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 24},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "phi3": {"sliding_window": None, "tie_word_embeddings": False},
    "phi": {"partial_rotary_factor": 0.5, "tie_word_embeddings": False},  # the head has a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},  # learned positions
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},  # not packed
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi: not packed
    "mamba": {"state_size": 4},  # its state is no key-value cache
}  # fmt: skip


def make(family: str, attention: str = "eager", **changes) -> torch.nn.Module:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class Ids:
    """Decodes ids into their numbers."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(map(str, row)) for row in rows]


def prompts(n: int = 5, lengths: tuple[int, ...] = (1, 2, 7, 30)) -> list[Prompt]:
    rng = random.Random(0)
    return [Prompt(f"p{i}", tuple(rng.randrange(12, VOCAB) for _ in range(rng.choice(lengths))), "") for i in range(n)]


def engine(model, **kwargs) -> LocalEngine:
    return LocalEngine(model, Ids(), stop_token_ids=kwargs.pop("stop_token_ids", STOPS), **kwargs)


def completions(groups):
    return [[r.completion for r in group] for group in groups]


def ids(groups):
    return [[c.ids for c in group] for group in completions(groups)]


def recomputed(model, rollout, temperature: float) -> torch.Tensor:
    """Log-probs of a completion by transformers' own forward of that one sequence."""
    prompt, completion = rollout.prompt.ids, rollout.completion.ids
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)


def test_the_cases_cover_both_ways_of_decoding():
    ways = {family: PolicyModule(make(family)).packing for family in FAMILIES}
    assert {f for f, way in ways.items() if way == "one_by_one"} == {"lfm2", "bloom", "mamba"}


def generated(model, prompt: Prompt, stops) -> tuple[int, ...]:
    """What transformers' generate continues a prompt with, greedily."""
    row = torch.tensor([prompt.ids])
    out = model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=40, do_sample=False, eos_token_id=list(stops), pad_token_id=0
    )  # fmt: skip
    return tuple(out[0, len(prompt.ids) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate_token_for_token(family):
    reference, ours = make(family), prompts()
    # Tokens that the model does come to, early in one row and late in another: the batch shrinks on the way.
    stops = {generated(reference, p, [VOCAB])[i] for p, i in zip(ours, (5, 12, 25))}
    groups = engine(make(family), stop_token_ids=stops).generate(ours, 2, Sampling(40, temperature=0))
    for prompt, group in zip(ours, groups):
        want = generated(reference, prompt, stops)
        assert [r.completion.ids for r in group] == [want, want]
        sampled = torch.tensor(group[0].completion.sampled_logprobs)
        assert torch.allclose(sampled, recomputed(reference, group[0], 1.0), atol=1e-4)
    assert len({len(c.ids) for g in completions(groups) for c in g}) > 1, "the case must have rows of several lengths"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_equal_a_plain_forward(family, temperature):
    reference = make(family)
    groups = engine(make(family)).generate(prompts(), 4, Sampling(24, temperature=temperature, seed=3))
    for rollout in (r for g in groups for r in g):
        gap = torch.tensor(rollout.completion.sampled_logprobs) - recomputed(reference, rollout, temperature)
        assert gap.abs().max() < 1e-4
    assert all(len({c.ids for c in group}) > 1 for group in completions(groups)), "samples of one prompt must differ"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "phi", "gpt2", "lfm2", "bloom", "mamba"])
def test_sampled_logprobs_equal_the_trainers(family, temperature):
    import numpy as np

    from llmrl.data.packing import pack
    from llmrl.types import Example

    module = PolicyModule(make(family))
    groups = engine(module).generate(prompts(), 3, Sampling(24, temperature=temperature))
    rollouts = [r for g in groups for r in g]
    examples = [
        Example(np.array(p + c, np.int32), np.arange(len(p) + len(c)) >= len(p), unit=i)
        for i, (p, c) in enumerate((r.prompt.ids, r.completion.ids) for r in rollouts)
    ]
    with torch.no_grad():
        scores = module(pack(examples), temperature=temperature)
    sampled = torch.tensor([x for r in rollouts for x in r.completion.sampled_logprobs])
    assert (scores.logprobs - sampled).abs().max() < 1e-4


def test_logits_are_made_in_parts(monkeypatch):
    model, want = make("phi"), ids(engine(make("phi")).generate(prompts(), 3, Sampling(12)))
    monkeypatch.setattr("llmrl.rollout.local._LOGITS", 4 * VOCAB + 1)
    assert ids(engine(model).generate(prompts(), 3, Sampling(12))) == want
    monkeypatch.setattr("llmrl.rollout.local._PREFILL_TOKENS", 8)
    assert ids(engine(model).generate(prompts(), 3, Sampling(12))) == want


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "lfm2"])
def test_rollouts_do_not_depend_on_what_else_is_in_the_batch(family):
    model, ours, sampling = make(family), prompts(7), Sampling(40, temperature=1.0, top_p=0.98, seed=5, step=2)
    whole = engine(model).generate(ours, 3, sampling)
    one_by_one = [engine(model).generate([p], 3, sampling)[0] for p in ours]
    backwards = engine(model).generate(ours[::-1], 3, sampling)[::-1]
    assert ids(whole) == ids(one_by_one) == ids(backwards)
    for budget in (1, 150, 450):  # a row at a time; a part of a group; about two groups, refilled as rows finish
        assert ids(engine(model, max_batch_tokens=budget).generate(ours, 3, sampling)) == ids(whole)
    assert [group[:1] for group in ids(whole)] == ids(
        engine(model).generate(ours, 1, sampling)
    )  # nor on the group's size
    assert ids(whole) != ids(engine(model).generate(ours, 3, dataclasses.replace(sampling, step=3)))


def test_the_budget_bounds_the_slots_and_finished_rows_leave(monkeypatch):
    from llmrl.models.decode import DecodeCache

    seen = []
    resize = DecodeCache.resize

    def spy(self, keep, extra, capacity):
        resize(self, keep, extra, capacity)
        seen.append((len(keep), extra, self.rows))

    monkeypatch.setattr(DecodeCache, "resize", spy)
    engine(make("qwen2"), max_batch_tokens=6 * 70).generate(prompts(8, lengths=(30,)), 3, Sampling(40))
    assert max(rows for *_, rows in seen) == 6
    assert any(keep and extra for keep, extra, _ in seen), "waiting prompts join rows that still decode"


def test_a_prompt_is_prefilled_once_for_all_rows_that_share_its_ids(monkeypatch):
    from llmrl.models.decode import DecodeCache

    tokens = []
    update = DecodeCache.update

    def spy(self, k, v, layer_idx, *args, **kwargs):
        if layer_idx == 0 and self._prefill is not None:
            tokens.append(k.shape[2])
        return update(self, k, v, layer_idx, *args, **kwargs)

    monkeypatch.setattr(DecodeCache, "update", spy)
    a, b = (9, 10, 11, 12), (20, 21)
    groups = engine(make("qwen2")).generate(
        [Prompt("x", a, ""), Prompt("y", b, ""), Prompt("z", a, "")], 4, Sampling(6)
    )
    assert tokens == [6]
    assert ids(groups)[0] != ids(groups)[2]  # the same ids under another name draw other numbers


def test_finish_reasons_stop_ids_and_text():
    groups = engine(make("qwen2")).generate(prompts(), 8, Sampling(20, temperature=1.5))
    reasons, stops = set(), set()
    for c in (c for g in completions(groups) for c in g):
        body = c.ids[:-1] if c.ids[-1] in STOPS else c.ids
        assert not set(body) & set(STOPS)
        assert c.finish_reason == ("stop" if c.ids[-1] in STOPS else "length")
        assert c.finish_reason == "stop" or len(c.ids) == 20
        assert c.text == " ".join(map(str, body))
        assert len(c.sampled_logprobs) == len(c.ids)
        reasons.add(c.finish_reason)
        stops.add(c.ids[-1])
    assert reasons == {"stop", "length"}
    assert len(stops & set(STOPS)) > 1


def test_one_token_one_generation_and_nothing_to_do():
    model = make("qwen2")
    groups = engine(model).generate(prompts(), 1, Sampling(1))
    assert [[len(c.ids) for c in g] for g in completions(groups)] == [[1]] * 5
    assert engine(model).generate([], 4, Sampling(3)) == []
    # A stop id on the last allowed token is a stop.
    last = ids(groups)[0][0][0]
    (group,) = engine(model, stop_token_ids=[last]).generate(prompts()[:1], 1, Sampling(1))
    assert group[0].completion.finish_reason == "stop"
    assert group[0].completion.text == ""


def test_growth_over_many_blocks_matches_a_plain_forward():
    reference = make("mistral")
    (group,) = engine(make("mistral"), stop_token_ids=()).generate(prompts()[:1], 2, Sampling(200))
    for rollout in group:
        assert len(rollout.completion.ids) == 200
        gap = torch.tensor(rollout.completion.sampled_logprobs) - recomputed(reference, rollout, 1.0)
        assert gap.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_types(dtype):
    model, bound = make("gemma2").to(dtype), {torch.bfloat16: 0.35, torch.float64: 1e-6}[dtype]
    reference = make("gemma2").to(dtype)
    for rollout in (r for g in engine(model).generate(prompts(), 2, Sampling(20)) for r in g):
        gap = torch.tensor(rollout.completion.sampled_logprobs) - recomputed(reference, rollout, 1.0)
        assert gap.abs().max() < bound


def test_autocast_stores_the_cache_in_its_type_and_leaves_nothing_behind():
    from llmrl.models.decode import DecodeCache

    model, types = make("qwen2"), set()
    allocate = DecodeCache._allocate

    def spy(self, like, dtype):
        types.add(dtype)
        return allocate(self, like, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeCache, "_allocate", spy)
        engine(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16)).generate(prompts(), 2, Sampling(8))
    assert types == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[8, 9, 10]])).logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "weight" in n)


def test_training_goes_on_as_before():
    module = PolicyModule(make("qwen2", attention_dropout=0.5)).train()
    module.model.gradient_checkpointing_enable()
    frozen = module.model.model.layers[0].mlp.eval()  # a part that someone set to eval stays there
    first = engine(module).generate(prompts(), 2, Sampling(12))
    assert ids(first) == ids(engine(module).generate(prompts(), 2, Sampling(12)))  # dropout was off
    assert module.training
    assert module.model.model.layers[0].self_attn.training
    assert not frozen.training
    assert torch.is_grad_enabled()
    assert module.model.is_gradient_checkpointing
    before = torch.get_rng_state()
    engine(module).generate(prompts(), 2, Sampling(12))
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn from the global generator


def test_lora_adapters_are_active():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("qwen2"), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    plain = ids(engine(make("qwen2")).generate(prompts(), 2, Sampling(12)))
    assert ids(engine(model).generate(prompts(), 2, Sampling(12))) == plain  # B starts at zero
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    groups = engine(model).generate(prompts(), 2, Sampling(12))
    assert ids(groups) != plain
    reference = model.merge_and_unload()
    reference.set_attn_implementation("eager")
    for rollout in (r for g in groups for r in g):
        gap = torch.tensor(rollout.completion.sampled_logprobs) - recomputed(reference, rollout, 1.0)
        assert gap.abs().max() < 1e-4


def test_versions_and_progress():
    calls = []
    ours = engine(make("qwen2"), progress=lambda tokens, finished: calls.append((tokens, finished)))
    ours.sync_weights(None, 7)
    groups = ours.generate(prompts(), 2, Sampling(9))
    assert ours.version == 7
    assert {c.version for g in completions(groups) for c in g} == {7}
    assert calls[-1] == (sum(len(c.ids) for g in completions(groups) for c in g), 10)
    assert calls == sorted(calls)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        (Prompt("row:4", (), ""), Sampling(4), "'row:4' has no tokens"),
        (Prompt("row:5", (9,) * 250, ""), Sampling(10), "'row:5' has 250 tokens.*256 positions"),
        (Prompt("row:6", (9, VOCAB), ""), Sampling(4), "'row:6'.*vocabulary of 96"),
        (Prompt("row:7", (9,), ""), Sampling(0), "max_tokens=0"),
    ],
)
def test_bad_input_is_told_by_prompt_before_work_starts(prompt, sampling, message):
    with pytest.raises(RolloutError, match=message):
        engine(make("qwen2")).generate([prompts()[0], prompt], 2, sampling)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
def test_logits_that_are_not_finite_stop_the_rollout(family, temperature):
    model = make(family)
    ours = engine(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    with pytest.raises(RolloutError, match=r"'bad'.*not finite"):
        ours.generate([Prompt("bad", (8, 50, 9), "")], 2, Sampling(4, temperature=temperature))
    assert torch.is_grad_enabled()


def test_a_nan_left_in_memory_that_a_mask_hides_does_not_reach_a_row(monkeypatch):
    """Fresh memory may hold NaN, and 0 * NaN is NaN: allocations are poisoned, the rollouts must not change."""
    model = make("gemma2")
    want = ids(engine(model).generate(prompts(), 3, Sampling(30)))
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(float("nan")))
    assert ids(engine(model).generate(prompts(), 3, Sampling(30))) == want


@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
def test_a_group_is_handed_over_when_its_last_row_has_finished(family):
    tokens, handed = [], []
    local = engine(make(family), progress=lambda count, finished: tokens.append(count), max_batch_tokens=900)
    groups = local.generate(
        prompts(7), 3, Sampling(40, seed=5), on_group=lambda i, group: handed.append((i, group, sum(tokens[-1:])))
    )
    assert [i for i, _, _ in handed] != list(range(7)), "in the order of finishing"
    assert all(groups[i] is group for i, group, _ in handed) and len(handed) == 7
    assert handed[0][2] < tokens[-1] / 2, "while others still decode"


def test_an_error_of_on_group_ends_the_generation():
    model, seen = make("qwen2").train(), []

    def refuse(i, group):
        seen.append(i)
        raise ValueError("stop")

    local = engine(model)
    with pytest.raises(ValueError, match="stop"):
        local.generate(prompts(5), 2, Sampling(20), on_group=refuse)
    assert len(seen) == 1 and all(m.training for m in model.modules())
    assert len(local.generate(prompts(5), 2, Sampling(20))) == 5
