"""TRL 1.16's losses, gradient norms and metrics on recorded inputs, to 1e-5 relative to max(1, |x|).

Rows run one at a time, unpadded; the hidden states of the tokens in the loss go through our head, and nothing else is TRL-like.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from llmrl.functional.advantages import group_advantages
from llmrl.functional.aggregate import token_weights
from llmrl.functional.logprobs import linear_logprobs, linear_weighted_nll
from llmrl.functional.masks import top_entropy_threshold
from llmrl.functional.objective import ObjectiveSettings, policy_objective

ORACLES = Path(__file__).parents[1] / "oracles"
SFT, GRPO = (json.loads((ORACLES / f"{name}.json").read_text()) for name in ("sft", "grpo"))
AGGREGATION = {"grpo": "seq_mean_token_mean", "bnpo": "token_mean", "dapo": "token_mean", "dr_grpo": "constant"}


def ours(case):
    return case["config"]["loss_type"] in AGGREGATION and "off_policy_mask_threshold" not in case["config"]


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        ORACLES / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def hidden_of(model, rows):
    """Hidden states [K, D] that predict the tokens of each (ids, first token in the loss), and those tokens [K]."""
    hidden, targets = [], []
    for ids, start in rows:
        ids = torch.tensor(ids)
        states = model.model(input_ids=ids[None]).last_hidden_state[0]
        hidden.append(states[start - 1 : -1])
        targets.append(ids[start:])
    return torch.cat(hidden), torch.cat(targets)


def close(got, want):
    return abs(got - want) <= 1e-5 * max(1.0, abs(want))


def check(model, loss, case):
    model.zero_grad(set_to_none=True)
    loss.backward()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    assert close(loss.item(), case["loss"])
    assert close(math.sqrt(sum(n * n for n in norms.values())), case["grad_norm"])
    assert norms.keys() == case["grad_norms"].keys()
    for name, want in case["grad_norms"].items():
        assert close(norms[name], want), name


def by_name(oracle, keep):
    return [pytest.param(c, id=c["name"]) for c in oracle["cases"] if keep(c)]


@pytest.mark.parametrize("case", by_name(SFT, lambda c: "label_smoothing_factor" not in c["config"]))
@pytest.mark.parametrize("fast", [True, False])
def test_sft(model, case, fast):
    inputs, config = SFT["inputs"], case["config"]
    rows = []
    for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"]):
        length = sum(mask)
        start = next(i for i, y in enumerate(labels) if y != -100)
        assert all(y == i for y, i in zip(labels[start:length], ids[start:length]))
        rows.append((ids[:length], 1 if "labels" in config else start))
    hidden, targets = hidden_of(model, rows)
    w = torch.full((len(targets),), 1.0 / config.get("num_items_in_batch", len(targets)))
    if fast:
        loss, _ = linear_weighted_nll(hidden, model.lm_head.weight, targets, w, loss_type=config["loss_type"])
    else:
        lp, _ = linear_logprobs(hidden, model.lm_head.weight, targets)
        loss = -(w * lp * (lp.detach().exp() if config["loss_type"] == "dft" else 1.0)).sum()
    check(model, loss, case)


def grpo_rows():
    i = GRPO["inputs"]
    rows, lengths = [], []
    for prompt, pm, completion, cm in zip(i["prompt_ids"], i["prompt_mask"], i["completion_ids"], i["completion_mask"]):
        prompt = [t for t, m in zip(prompt, pm) if m]
        completion = [t for t, m in zip(completion, cm) if m]
        rows.append((prompt + completion, len(prompt)))
        lengths.append(len(completion))
    return rows, lengths


def flat(name):
    """[K] of a padded [B, T] input: completion tokens only."""
    values, mask = torch.tensor(GRPO["inputs"][name]), torch.tensor(GRPO["inputs"]["completion_mask"]).bool()
    return values[mask]


@pytest.mark.parametrize("case", by_name(GRPO, ours))
def test_grpo(model, case):
    c = case["config"]
    rows, lengths = grpo_rows()
    hidden, targets = hidden_of(model, rows)
    lp, entropy = linear_logprobs(hidden, model.lm_head.weight, targets, temperature=c["temperature"], entropy=True)
    n, sequence = len(rows), torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    total = c["num_items_in_batch"] if c["loss_type"] == "dapo" else sum(lengths)
    weights = token_weights(
        AGGREGATION[c["loss_type"]],
        lengths,
        total_tokens=total,
        total_sequences=n,
        constant=c["max_completion_length"],
    )
    settings = ObjectiveSettings(
        epsilon=c["epsilon"],
        epsilon_high=c["epsilon_high"],
        delta=c.get("delta"),
        importance_sampling_level=c.get("importance_sampling_level", "token"),
        beta=c["beta"],
        use_bias_correction_kl=c["use_bias_correction_kl"],
        entropy_coef=c.get("entropy_coef", 0.0),
    )
    suffix = f"logps_t{c['temperature']}"
    data = {
        "logprobs": lp,
        "entropy": entropy,
        "old_logprobs": flat(f"old_{suffix}") if c["uses_old_logps"] else lp.detach(),
        "ref_logprobs": flat(f"ref_{suffix}"),
        "advantages": torch.tensor(GRPO["inputs"]["advantages"])[sequence],
        "weights": torch.tensor(weights)[sequence],
        "sequence": sequence,
    }
    if "top_entropy_quantile" in c:
        keep = entropy.detach() >= top_entropy_threshold(entropy.detach(), c["top_entropy_quantile"])
        data["advantages"] = data["advantages"].where(keep, 0.0)
    loss, stats = policy_objective(**data, num_sequences=n, token_share=1 / sum(lengths), settings=settings)
    check(model, loss, case)
    if c.get("importance_sampling_level") != "sequence" and not {"top_entropy_quantile", "delta"} & set(c):
        # At the sequence level TRL's clip ratios are shares of sequences, ours of tokens; with delta, TRL counts the ratio that
        # delta has capped already; with top_entropy_quantile, it counts clipped tokens that get no gradient.
        shared = set(stats) & set(case["metrics"])
        assert shared >= {"entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
        assert ("kl" in shared) == (c["beta"] > 0)
        for name in shared:
            assert close(stats[name].item(), case["metrics"][name]), name


def test_the_oracle_cases_that_are_ours():
    names = {c["name"] for c in GRPO["cases"] if ours(c)}
    assert names >= {
        "grpo", "grpo/plain_kl", "bnpo", "bnpo/plain_kl", "dr_grpo", "dr_grpo/plain_kl", "dapo", "dapo/plain_kl", "grpo_onpolicy",
        "dapo_clip_higher", "grpo_delta1.2", "gspo", "gspo_wide", "grpo_temp0.7", "grpo_entropy0.01", "dapo_top_entropy0.2",
        "dapo_num_items_200",
    }  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs(model, temperature):
    rows, _ = grpo_rows()
    with torch.no_grad():
        hidden, targets = hidden_of(model, rows)
        lp, _ = linear_logprobs(hidden, model.lm_head.weight, targets, temperature=temperature)
    torch.testing.assert_close(lp, flat(f"policy_logps_t{temperature}"), rtol=0, atol=1e-5)


def test_advantages():
    rewards = torch.tensor(GRPO["inputs"]["rewards"])
    got = group_advantages(rewards, torch.arange(8) // 4)  # two prompts, four completions each
    torch.testing.assert_close(got, torch.tensor(GRPO["inputs"]["advantages"]), rtol=0, atol=1e-6)
