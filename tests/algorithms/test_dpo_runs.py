"""DPO learns a planted preference without forgetting what it prefers, raises a reward online, and resumes bit for bit."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmrl.algorithms.dpo import DPOTrainer, best_and_worst
from llmrl.algorithms.sft import SFTTrainer
from llmrl.config.dpo import DPOConfig
from llmrl.config.sft import SFTConfig
from llmrl.errors import DivergenceError
from llmrl.experience.collect import Group
from llmrl.types import Completion, Prompt, Rollout, ScoredRollout
from tests.algorithms import dpo_resume_worker
from tests.algorithms.test_learning import count_letters, history
from tests.algorithms.test_resume import whole_and_resumed
from tests.scorers import PlainScorer

PROMPTS = ("the answer", "is", "because", "three", "times", "four", "twelve", "12")


def planted(n, start=0):
    """Answers that repeat the prompt and end with "is four", preferred, or "is three": they have most of their tokens in common."""
    rng = random.Random(0)
    prompts = [" ".join(rng.choice(PROMPTS) for _ in range(3)) for _ in range(start + n)]
    return [{"prompt": p, "chosen": f" {p} is four", "rejected": f" {p} is three"} for p in prompts[start:]]


@pytest.fixture(scope="module")
def tuned(tiny_model_dir, tmp_path_factory):
    """A model that gives either answer, as often the one as the other."""
    out = tmp_path_factory.mktemp("sft")
    rows = [{"prompt": r["prompt"], "completion": r[side]} for r in planted(64) for side in ("chosen", "rejected")]
    config = SFTConfig(
        model_name_or_path=str(tiny_model_dir), output_dir=str(out), batch_size=32, max_steps=80, learning_rate=1e-2
    )
    SFTTrainer(config, train_dataset=rows).train()
    return out / "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_type", "change"),
    [(["sigmoid", "nll"], (0.2, 0.8)), (["nca"], (-0.5, 0.8)), (["sigmoid"], (-20.0, -1.5))],
    ids=["sigmoid+nll", "nca", "sigmoid"],
)
def test_a_planted_preference_is_learnt(tuned, tmp_path, loss_type, change):
    """Held out. The chosen answer's log-prob starts near log 1/2 and changes by so many nats: an NLL term raises it, NCA holds it,
    and plain DPO, where answers have so much in common, pushes it down with the rejected one."""
    config = DPOConfig(
        model_name_or_path=str(tuned), output_dir=str(tmp_path), batch_size=16, max_steps=25, learning_rate=1e-3,
        loss_type=loss_type,
    )  # fmt: skip
    trainer = DPOTrainer(config, train_dataset=planted(48), eval_dataset=planted(16, 48))
    before = trainer.evaluate()
    trainer.train()
    after = history(tmp_path)[-1]
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-6) and before["eval_logps/chosen"] > -1.2
    assert after["eval_accuracy"] >= 0.95 and after["eval_accuracy_low"] > 0.75
    assert after["eval_rewards/margins"] > 0.5
    assert change[0] < after["eval_logps/chosen"] - before["eval_logps/chosen"] < change[1]
    assert after["eval_logps/rejected"] < before["eval_logps/rejected"] - 5


# online


def scored(rewards, ids=None):
    prompt = Prompt("p", (5, 6, 7), "p")
    ids = ids or [(10 + i, 2) for i in range(len(rewards))]
    rows = [
        ScoredRollout(Rollout(prompt, Completion(i, (-1.0,) * len(i), "stop", ""), n), reward, {})
        for n, (reward, i) in enumerate(zip(rewards, ids))
    ]
    return Group(0, rows)


@pytest.mark.parametrize(
    ("rewards", "pair"),
    [
        ([0.0, 1.0, 0.5], (1, 0)),
        ([1.0, 0.0, 1.0, 0.0], (0, 1)),
        ([None, 0.2, None, 0.1], (1, 3)),
        ([-2.0, -1.0], (1, 0)),
        ([0.0, -1.0, None], (0, 1)),
        ([0.3, 0.3], None),
        ([None, 0.3], None),
        ([None, None], None),
    ],
)
def test_best_and_worst(rewards, pair):
    group = scored(rewards)
    for given in (group, replace(group, rollouts=group.rollouts[::-1])):  # whatever their order
        found = best_and_worst(given)
        assert (None if found is None else tuple(r.rollout.index for r in found)) == pair


def test_the_same_answer_twice_is_no_pair():
    assert best_and_worst(scored([0.0, 1.0], ids=[(4, 2), (4, 2)])) is None
    assert best_and_worst(scored([0.0, 1.0], ids=[(4, 2), (4, 4)])) is not None


def online_trainer(model, out, **settings):
    config = DPOConfig(**{
        "model_name_or_path": str(model), "output_dir": str(out), "batch_size": 8, "num_generations": 6,
        "max_completion_length": 12, "max_steps": 20, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **settings,
    })  # fmt: skip
    rows = [{"prompt": text} for text in PROMPTS]
    return DPOTrainer(config, train_dataset=rows, eval_dataset=rows, reward_funcs=count_letters)


def test_pairs_of_samples_become_examples(tiny_model_dir, tmp_path):
    trainer = online_trainer(tiny_model_dir, tmp_path, updates_per_step=3, temperature=0.7, max_steps=1)
    experience = trainer.rollouts.collect(1)
    parts, metrics = trainer._pair(experience)
    assert len(parts) == 3 and metrics["pairs"] == sum(map(len, parts)) / 2 == 8
    by_prompt = {g.index: best_and_worst(g) for g in experience.groups}
    for part in parts:
        for chosen, rejected in zip(part[0::2], part[1::2]):
            best, worst = (r.rollout for r in by_prompt[chosen.unit])
            n = rejected.prefix
            assert tuple(chosen.input_ids) == best.prompt.ids + best.completion.ids and n == len(best.prompt.ids)
            assert tuple(rejected.input_ids) == worst.completion.ids and rejected.loss_mask.all()
            assert not chosen.loss_mask[:n].any() and chosen.loss_mask[n:].all()
    # the gap is measured at the sampler's temperature, the loss is at 1
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    flat = [e for part in parts for e in part]
    got = trainer._sequence_logprobs(flat, lambda module, batch: module(batch))
    want = []
    for i, e in enumerate(flat):
        ids = torch.tensor([*flat[i - i % 2].input_ids[: e.prefix], *e.input_ids], dtype=torch.int64)
        logprobs = torch.log_softmax(trainer.model.eval()(ids[None], use_cache=False).logits[0, :-1], -1)
        start = len(ids) - int(e.loss_mask.sum())
        want.append(logprobs[range(start - 1, len(ids) - 1), ids[start:]].sum().item())
    assert got == pytest.approx(want, rel=1e-5)


def test_a_sampler_with_other_weights_stops_the_run(tiny_model_dir, tmp_path):
    trainer = online_trainer(tiny_model_dir, tmp_path, max_steps=2)
    pair = trainer._pair

    def shifted(experience):
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(1.5)
        return pair(experience)

    trainer._pair = shifted
    with pytest.raises(DivergenceError, match="max_logprob_gap"):
        trainer.train()


def test_a_step_without_a_pair_makes_no_update(tiny_model_dir, tmp_path, caplog):
    class Same(PlainScorer):
        def score(self, rollouts, trainer_state=None):
            return [ScoredRollout(r, 1.0, {}) for r in rollouts]

    trainer = online_trainer(tiny_model_dir, tmp_path, max_steps=2, max_refills=0)
    trainer.rollouts.collector.scorer = Same()
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters()))
    assert [line["pairs"] for line in history(tmp_path)] == [0, 0] and "no update" in caplog.text


@pytest.mark.slow
def test_online_dpo_raises_a_countable_reward(tiny_model_dir, tmp_path):
    summary = online_trainer(tiny_model_dir, tmp_path).train()
    lines = history(tmp_path)
    first, last = (sum(line["reward"] for line in part) / 3 for part in (lines[:3], lines[-3:]))
    assert last > first + 0.35, (first, last)
    assert max(line["sampling/sampling_logp_difference/mean"] for line in lines) < 1e-4
    assert summary["status"] == "finished" and lines[-1]["eval_reward"] > 0.1
    samples = [json.loads(line) for line in (tmp_path / "samples/step_00000001.jsonl").read_text().splitlines()]
    assert len(samples) == 48 and sorted({s["advantage"] for s in samples}) == [-1, 0, 1]


# resume


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "moving", "online"])
def test_kill_and_resume_is_exact(kind, tiny_model_dir, tmp_path):
    whole, broken = whole_and_resumed(dpo_resume_worker, kind, tiny_model_dir, tmp_path, kill_at=8, saved=5)
    weights = Path("model", "adapter_model.safetensors" if kind == "lora" else "model.safetensors")
    last = Path("checkpoints/step_00000010")
    kept = [weights, last / "optimizer.safetensors"] + [last / "reference.safetensors"] * (kind == "moving")
    for file in kept:
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
