"""Reward models as a reward: the scores are those of transformers on the reward model's own rendering of the text."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from llmrl.cli.main import main
from llmrl.config.grpo import GRPOConfig
from llmrl.config.model import ModelFields
from llmrl.config.reward import RewardSpec
from llmrl.errors import ConfigError, RewardError
from llmrl.models.load import save_model
from llmrl.models.scorer import load_scorer
from llmrl.rewards.learned import LearnedReward, combine
from llmrl.rewards.runner import RewardRunner
from llmrl.rewards.tally import Tally
from llmrl.types import Completion, Prompt, Rollout

SAYS = (  # another template than the policy's ChatML, another BOS and EOS
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}: {{ m['content'] }}]{% endfor %}"
    "{% if tools %}tools {{ tools | length }}{% endif %}{% if add_generation_prompt %}[assistant: {% endif %}"
)
POSITIONS = 96


def make_reward_model(path, tokenizer, seed: int, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, max_position_embeddings=POSITIONS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None, **changes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    save_model(*load_scorer(ModelFields(model_name_or_path=str(path / "base"))), path / "model")
    return path / "model"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two reward models with a tokenizer and a template that the policy does not have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(["[user: three] [assistant: four]"] * 20, trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = SAYS
    root = tmp_path_factory.mktemp("reward_models")
    return [str(make_reward_model(root / f"rm{seed}", fast, seed)) for seed in (1, 2)]


def rollout(prompt, text, number=0, index=0, finish="stop", **columns) -> Rollout:
    return Rollout(Prompt(f"p{number}", (1, 2), prompt, columns), Completion((1,), (0.0,), finish, text), index)


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def some():
    """Groups of two prompts with shared and equal beginnings, a plain prompt, a cut one, an empty one."""
    first, second = chat("three times four"), chat("hi", "hello", "and now?")
    return [
        rollout(first, "twelve", 0, 0), rollout(second, "what", 1, 0), rollout(first, "twelve, since", 0, 1),
        rollout("2 + 2 =", " 4", 2, 0), rollout(first, "twelve", 0, 2), rollout(first, "", 0, 3, "length"),
        rollout("2 + 2 =", " 5 or so", 2, 1, "length"), rollout(first, "no", 0, 4, tools='[{"type": "function"}]'),
    ]  # fmt: skip


def by_transformers(path, rollouts) -> list[float]:
    """Row by row: the template's own tokens of the conversation, or BOS, text and EOS; the model's logit."""
    model = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    scores = []
    for r in rollouts:
        prompt, text = r.prompt.text, r.completion.text
        if isinstance(prompt, str):
            ids = tokenizer(prompt + text)["input_ids"] + [tokenizer.eos_token_id]
        else:
            messages = [*prompt, {"role": "assistant", "content": text}]
            tools = json.loads(r.prompt.columns.get("tools", "null"))
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids if len(ids) <= POSITIONS else [tokenizer.bos_token_id, *ids[len(ids) - POSITIONS + 1 :]]
        with torch.no_grad():
            scores.append(float(model(input_ids=torch.tensor([ids])).logits))
    return scores


@pytest.mark.parametrize("budget", [1, 40, 16384])
def test_scores_are_transformers_own(models, budget):
    rollouts = [*some(), rollout(chat("x" * 200), "y", 7), rollout("x" * 200, "y", 8)]
    scores = LearnedReward(RewardSpec(model=models[:1], tokens_per_batch=budget))(rollouts)
    assert np.allclose(scores, by_transformers(models[0], rollouts), atol=1e-5)
    assert len({round(s, 4) for s in scores}) == len(rollouts) - 1  # two completions are the same


def test_beginnings_are_computed_once_within_the_budget(models, monkeypatch):
    reward = LearnedReward(RewardSpec(model=models[:1], tokens_per_batch=70))
    seen = []
    module = reward._models[0]._module
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda batch: seen.append(batch) or forward(batch))
    rollouts = [rollout(chat("three times four"), f"a{i % 20:02}", 0, i) for i in range(40)]
    scores = reward(rollouts)
    assert scores[:20] == scores[20:], "equal completions have equal rewards, to the last bit"
    assert np.allclose(scores, by_transformers(models[0], rollouts), atol=1e-5)
    assert sum(b.num_sequences for b in seen) == 20
    assert max(b.num_tokens for b in seen) <= 70 and sum(b.num_tokens for b in seen) < 200  # 20 x 22 without sharing


def test_order_does_not_matter(models):
    reward, rollouts = LearnedReward(RewardSpec(model=models)), some()
    order = [5, 3, 7, 0, 6, 2, 4, 1]
    assert np.allclose(reward([rollouts[i] for i in order]), np.array(reward(rollouts))[order], atol=1e-6)
    assert np.allclose([reward([r])[0] for r in rollouts], reward(rollouts), atol=1e-6)


def test_ensembles(models):
    a, b = (np.array(by_transformers(m, some())) for m in models)
    wanted = {"mean": (a + b) / 2, "min": np.minimum(a, b), "mean_minus_std": (a + b) / 2 - 0.5 * np.abs(a - b) / 2}
    for ensemble, want in wanted.items():
        spec = RewardSpec(model=models, ensemble=ensemble, ensemble_std_weight=0.5)
        assert np.allclose(LearnedReward(spec)(some()), want, atol=1e-5)
    assert combine(np.array([[1.0], [2.0], [6.0]]), "mean_minus_std", 2.0)[0] == pytest.approx(3 - 2 * np.sqrt(14 / 3))


def test_a_prompt_that_the_completion_goes_on_with_is_one_turn(models):
    reward = LearnedReward(RewardSpec(model=models[:1]))
    started = rollout(chat("three?", "it is"), " twelve")
    assert reward([started]) == pytest.approx(reward([rollout(chat("three?"), "it is twelve")]))


def test_long_conversations_keep_bos_and_end(models):
    reward = LearnedReward(RewardSpec(model=models[:1], max_length=12))
    one, other = rollout(chat("three " * 9), "four"), rollout(chat("since " * 9 + "three " * 9), "four")
    assert reward([one]) == pytest.approx(reward([other]), abs=1e-6)
    ((_, ids),) = reward._models[0]._tokens([one], {})
    assert len(ids) == 12 and ids[0] == 0


def test_a_runner_takes_models_like_functions(models, tmp_path):
    specs = [RewardSpec(model=models[:1], weight=2.0), RewardSpec(function="think_format", weight=0.5)]
    specs.append(RewardSpec(model=models, name="both", weight=0.0))
    rollouts = [rollout(chat("three?"), "<think>a</think>b", i) for i in range(2)]
    want = by_transformers(models[0], rollouts)
    with RewardRunner(specs) as runner:
        assert runner.names == ["rm1", "think_format", "both"] and not runner.check_golds([r.prompt for r in rollouts])
        scored = runner.score(rollouts, tally=(tally := Tally()))
        metrics = tally.metrics()
        held = runner._functions[0]
    assert [s.parts["rm1"] for s in scored] == pytest.approx(want, abs=1e-5)
    assert scored[0].reward == pytest.approx(2 * want[0] + 0.5, abs=1e-5) and scored[0].outcomes["rm1"] == "score"
    assert metrics["reward_outcomes/rm1/score"] == 2 and metrics["reward_seconds/rm1"] > 0
    assert held.model is None, "closing lets go of the weights"
    with pytest.raises(ConfigError, match="two reward functions are called 'rm1'"):
        RewardRunner([RewardSpec(model=models[:1])] * 2)
    with RewardRunner([RewardSpec(model=models)]) as runner:
        assert runner.names == ["rm1+rm2"]


def test_models_that_are_not_there_fail_at_once(tmp_path, tiny_model_dir):
    with pytest.raises(ConfigError, match="there is no directory"):
        RewardRunner([RewardSpec(model=[str(tmp_path / "nowhere")])])
    with pytest.raises(ConfigError, match="is no reward model: it has no score layer"):
        RewardRunner([RewardSpec(model=[str(tiny_model_dir)])])


def test_rows_without_a_score_are_named(models, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(models[0])
    with torch.no_grad():
        model.get_input_embeddings().weight[
            AutoTokenizer.from_pretrained(models[0])("z", add_special_tokens=False)["input_ids"]
        ] = torch.nan
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(tmp_path)
    rollouts = [rollout("a", " b", 0), rollout("a", " z", 1, 3)]
    spec = RewardSpec(model=[str(tmp_path)], name="nan")
    with pytest.raises(RewardError, match="malformed on row 'p1', sample 3"):
        LearnedReward(spec)(rollouts)
    with RewardRunner([spec]) as runner, pytest.raises(RewardError, match="'nan': malformed on row 'p1', sample 3"):
        runner.score(rollouts)
    with RewardRunner([spec], on_error="skip") as runner:
        assert [s.parts["nan"] is None for s in runner.score(rollouts)] == [False, True]
    strange = [rollout("a", " b", 0), rollout([{"role": "nobody", "content": "x"}], "y", 4)]
    with pytest.raises(RewardError, match="error on row 'p4', sample 0"):
        LearnedReward(RewardSpec(model=models[:1]))(strange)


def test_saved_type_is_kept(models, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(models[0]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(tmp_path)
    reward = LearnedReward(RewardSpec(model=[str(tmp_path)]))
    assert {p.dtype for p in reward._models[0]._module.parameters()} == {torch.bfloat16}
    assert np.allclose(reward(some()), by_transformers(models[0], some()), atol=0.15)


def recipe(tiny_model_dir, tmp_path, models, **changes):
    settings = {
        "model_name_or_path": str(tiny_model_dir), "output_dir": str(tmp_path / "run"), "batch_size": 2, "num_generations": 4,
        "max_completion_length": 6, "max_steps": 2, "rewards": {"model": models[0], "weight": 0.5}, "num_samples_logged": 0,
    }  # fmt: skip
    return GRPOConfig(**{**settings, **changes})


def test_a_recipe_names_a_model(tiny_model_dir, tmp_path, models):
    spec = recipe(tiny_model_dir, tmp_path, models).rewards[0]
    assert (spec.model, spec.weight, spec.ensemble) == ([models[0]], 0.5, "mean")
    with pytest.raises(ConfigError, match=r"`function` .* a `model`"):
        recipe(tiny_model_dir, tmp_path, models, rewards={"model": models[0], "function": "length"})


def test_check_tries_a_model(tiny_model_dir, tmp_path, models, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": f"{i} plus 1 is"}) + "\n" for i in range(4)))
    arguments = [
        f"model_name_or_path={tiny_model_dir}",
        "output_dir=o",
        f"dataset={tmp_path / 'd.jsonl'}",
        f"rewards.0.model={models[0]}",
    ]
    assert main(["check", "grpo", *arguments, "batch_size=2", "num_generations=2", "max_completion_length=8"]) == 0
    out = capsys.readouterr().out
    assert "rm1 x 1" in out and "nothing found that would stop a run" in out


@pytest.mark.slow
def test_grpo_trains_on_a_model(tiny_model_dir, tmp_path, models):
    from llmrl.algorithms.grpo import GRPOTrainer

    rows = [{"prompt": chat("three times four")}, {"prompt": chat("what is it?")}]
    summary = GRPOTrainer(recipe(tiny_model_dir, tmp_path, models), train_dataset=rows).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary["status"] == "finished" and len(lines) == 2
    assert all(line["reward_outcomes/rm1/score"] == 8 for line in lines)
    assert all(np.isfinite(line["reward"]) and line["reward_std"] > 0 for line in lines)
