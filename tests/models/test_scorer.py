"""Reward models and critics: transformers alone gives the scores that llmrl gives, however they were saved and padded."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from llmrl.config.model import LoraSettings, ModelFields
from llmrl.config.ppo import PPOConfig
from llmrl.data.packing import pack
from llmrl.errors import ConfigError
from llmrl.models.export import write_export
from llmrl.models.load import load_policy, read_weights, save_model, stop_token_ids
from llmrl.models.score import ScoreModule
from llmrl.models.scorer import (
    load_critic,
    load_critic_skeleton,
    load_frozen_scorer,
    load_scorer,
    load_scorer_skeleton,
)
from llmrl.types import Example
from tests.models.families import ONE_BY_ONE, PACKED, config_of

LENGTHS = (7, 3, 12, 2)
N = 295  # tokens of the tiny tokenizer


def fields(path, **changes) -> ModelFields:
    return ModelFields(model_name_or_path=str(path), **changes)


def lora(**changes) -> LoraSettings:
    return LoraSettings(**{"r": 4, "lora_alpha": 8.0, **changes})


def train(model) -> None:
    """Moves everything trainable away from where it began."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def rows(vocab: int, avoid: int | None) -> list[list[int]]:
    rng = np.random.default_rng(3)
    made = [rng.integers(1, vocab, n).tolist() for n in LENGTHS]
    return [[i if i != avoid else (i + 1) % vocab for i in row] for row in made]


def packed(documents) -> object:
    examples = [
        Example(np.array(d, np.int32), np.arange(len(d)) == len(d) - 1, unit=i) for i, d in enumerate(documents)
    ]
    return pack(examples)


def ours(model, documents) -> torch.Tensor:
    with torch.no_grad():
        return ScoreModule(model.eval())(packed(documents))


def theirs(model, documents, side: str) -> torch.Tensor:
    """transformers' own scores of one padded batch."""
    width, pad = max(map(len, documents)), model.config.pad_token_id
    fill = [[pad] * (width - len(d)) for d in documents]
    ids = torch.tensor([f + d if side == "left" else d + f for d, f in zip(documents, fill)])
    mask = torch.tensor([[0] * len(f) + [1] * len(d) if side == "left" else [1] * len(d) + [0] * len(f) for d, f in zip(documents, fill)])  # fmt: skip
    # transformers numbers positions from the start of the row, padding included; rotary models don't mind, learned positions do
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 0]


def reload(path, **kwargs):
    return AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager", **kwargs)


def pad_variant(tokenizer, path, variant: str):
    """A language model with as many embeddings as tokens, and a tokenizer whose padding is fine, its EOS or absent.

    "reserved": as eos, with a reserved token. "spare": as eos, with five rows that no token has.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    if variant != "fine":  # nothing that looks unused is left
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<|pad|>"]
        data["model"]["vocab"]["<|zero|>"] = data["model"]["vocab"].pop("<|pad|>")
    pad = {"fine": "<|pad|>", "none": None}.get(variant, "<|im_end|>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<|im_end|>", pad_token=pad
    )
    fast.chat_template = tokenizer.chat_template
    if variant == "reserved":
        fast.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    size = len(fast) + 5 * (variant == "spare")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=2, pad_token_id=fast.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("variant", "pad", "grows"), [("fine", 0, 0), ("eos", N, 1), ("none", N, 1), ("reserved", N, 0), ("spare", N, 0)]
)
def test_saved_scores_are_transformers_own(tiny_tokenizer, tmp_path, variant, pad, grows):
    path = pad_variant(tiny_tokenizer, tmp_path / "base", variant)
    model, tokenizer = load_scorer(fields(path))
    assert (model.config.pad_token_id, tokenizer.pad_token_id) == (pad, pad) and pad not in stop_token_ids(
        model, tokenizer
    )
    base = AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight
    size = len(base) + grows
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == size
    assert torch.equal(model.get_input_embeddings().weight[: len(base)], base)
    train(model)
    documents = rows(N, pad)
    documents[0][-1] = tokenizer.eos_token_id  # the token that transformers would skip, were it the padding
    want = ours(copy.deepcopy(model), documents)
    save_model(model, tokenizer, tmp_path / "rm")
    saved = reload(tmp_path / "rm")
    assert saved.config.num_labels == 1 and saved.config.id2label == {0: "reward"}
    for side in ("left", "right"):
        assert torch.allclose(theirs(saved, documents, side), want, atol=1e-5)
    again, own = load_scorer(fields(tmp_path / "rm"))
    assert own.pad_token_id == pad and again.config.vocab_size == size and len(own) == len(tokenizer)
    assert torch.equal(ours(again, documents), want)
    fresh, _ = load_scorer(fields(path))
    fresh.load_state_dict(read_weights(fresh, tmp_path / "rm"), strict=False)
    assert torch.equal(ours(fresh, documents), want)


def test_padding_avoids_further_tokens_that_end_a_sequence(tiny_model_dir):
    model, tokenizer = load_scorer(fields(tiny_model_dir), ids_that_end=[0])
    assert tokenizer.pad_token_id not in (0, 1, 2, None) and model.config.pad_token_id == tokenizer.pad_token_id


def test_eos_learns_where_it_was_the_padding(tiny_tokenizer, tmp_path):
    path = pad_variant(tiny_tokenizer, tmp_path, "eos")
    model, tokenizer = load_scorer(fields(path))
    ScoreModule(model)(packed([[5, 6, tokenizer.eos_token_id]])).sum().backward()
    assert model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].any()


def test_a_new_score_layer_is_stiennons_and_seeded(tiny_model_dir, caplog):
    layers = [load_scorer(fields(tiny_model_dir))[0].score.weight for _ in range(2)]
    assert torch.equal(*layers) and layers[0].shape == (1, 48)
    assert not caplog.records, "transformers' report of what is new as missing"
    assert 0.6 < float(layers[0].detach().std()) * 49**0.5 < 1.4
    config = PPOConfig(model_name_or_path=str(tiny_model_dir), output_dir="x", seed=7)
    assert not torch.equal(load_scorer(config)[0].score.weight, layers[0])


def test_adapters_bring_their_score_layer(tiny_model_dir, tmp_path):
    config = fields(tiny_model_dir, lora=lora())
    model, tokenizer = load_scorer(config)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert sum("score" in n for n in names) == 1 and all("lora_" in n or "score.modules_to_save" in n for n in names)
    train(model)
    documents = rows(384, 0)
    want = ours(model, documents)
    save_model(model, tokenizer, tmp_path / "rm")
    assert not (tmp_path / "rm" / "model.safetensors").exists()
    base = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    on_base = PeftModel.from_pretrained(reload(tiny_model_dir, **base), tmp_path / "rm")
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", **base)
    by_transformers = reload(tmp_path / "rm", **base)
    write_export(str(tmp_path / "rm"), tmp_path / "merged", merge=True)
    merged = reload(tmp_path / "merged")
    assert type(merged).__name__ == "Qwen2ForSequenceClassification" and merged.config.num_labels == 1
    for loaded in (on_base, auto, by_transformers, merged):
        for side in ("left", "right"):
            assert torch.allclose(theirs(loaded, documents, side), want, atol=1e-5)
    continued, _ = load_scorer(fields(tmp_path / "rm"))
    assert torch.equal(ours(continued, documents), want)
    assert {n for n, p in continued.named_parameters() if p.requires_grad} == names
    fresh, _ = load_scorer(config)
    fresh.load_state_dict(read_weights(fresh, tmp_path / "rm"), strict=False)
    assert torch.equal(ours(fresh, documents), want)
    for directory in ("rm", "merged"):
        frozen, _ = load_frozen_scorer(str(tmp_path / directory))
        assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
        assert torch.allclose(ours(frozen, documents), want, atol=1e-5)


def test_an_adapter_adds_no_row(tiny_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no token for padding other than those that end a text"):
        load_scorer(fields(pad_variant(tiny_tokenizer, tmp_path / "eos", "eos"), lora=lora()))
    for variant, token in (("reserved", "<|reserved_0|>"), ("spare", "<|pad|>")):
        model, tokenizer = load_scorer(fields(pad_variant(tiny_tokenizer, tmp_path / variant, variant), lora=lora()))
        assert tokenizer.pad_token == token and model.config.pad_token_id == tokenizer.pad_token_id == N


def test_adapters_of_another_kind_are_refused(tiny_model_dir, tmp_path):
    for name, load in (("policy", load_policy), ("rm", load_scorer)):
        model, tokenizer = load(fields(tiny_model_dir, lora=lora()))
        save_model(model, tokenizer, tmp_path / name)
    with pytest.raises(ConfigError, match="an adapter of a reward model"):
        load_policy(fields(tmp_path / "rm"))
    with pytest.raises(ConfigError, match="an adapter of a language model"):
        load_scorer(fields(tmp_path / "policy"))


def test_what_is_no_reward_model_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match="no score layer"):
        load_frozen_scorer(str(tiny_model_dir))
    with pytest.raises(ConfigError, match="rewards: model: there is no directory"):
        load_frozen_scorer(str(tmp_path / "nowhere"))
    two = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ConfigError, match="classifies into 2 labels"):
        load_scorer(fields(tmp_path / "two"))
    model, tokenizer = load_scorer(fields(tiny_model_dir))
    save_model(model, tokenizer, tmp_path / "rm")
    with pytest.raises(ConfigError, match="is a reward model, not a language model"):
        load_policy(fields(tmp_path / "rm"))
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "rm" / "model.safetensors")
    for missing in ("score.weight", "model.norm.weight"):
        save_file(
            {n: w for n, w in weights.items() if n != missing}, tmp_path / "rm" / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(ConfigError, match=f"lacks 1 of the model's tensors, {missing}"):
            load_scorer(fields(tmp_path / "rm"))
    with pytest.raises(ConfigError, match="no sequence classifier for 'granite'"):
        path = tmp_path / "granite"
        AutoModelForCausalLM.from_config(config_of("granite")).save_pretrained(path)
        load_scorer(fields(path))


def test_skeletons_have_the_same_parameters(tiny_model_dir, tiny_tokenizer, tmp_path):
    for path, settings in (
        (tiny_model_dir, None),
        (tiny_model_dir, lora()),
        (pad_variant(tiny_tokenizer, tmp_path, "eos"), None),
    ):
        config = fields(path, lora=settings)
        (skeleton, own), (model, tokenizer) = load_scorer_skeleton(config), load_scorer(config)
        assert all(p.is_meta for p in skeleton.parameters())
        sizes = [{n: (p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in (skeleton, model)]
        assert sizes[0] == sizes[1] and own.pad_token_id == tokenizer.pad_token_id


def ppo(path, **changes) -> PPOConfig:
    return PPOConfig(model_name_or_path=str(path), output_dir="x", critic="separate", **changes)


def test_critics_start_at_0_or_as_the_reward_model(tiny_model_dir, tmp_path):
    documents = rows(384, 0)
    critic = load_critic(ppo(tiny_model_dir))
    assert critic.training and not ours(critic, documents).any()
    model, tokenizer = load_scorer(fields(tiny_model_dir))
    save_model(model, tokenizer, tmp_path / "rm")
    assert torch.equal(ours(load_critic(ppo(tiny_model_dir, critic_model_name_or_path=str(tmp_path / "rm"))), documents), ours(model, documents))  # fmt: skip
    adapted = load_critic(ppo(tiny_model_dir, lora=lora()))
    assert not ours(adapted, documents).any() and any("lora_" in n for n, p in adapted.named_parameters())
    skeleton = load_critic_skeleton(ppo(tiny_model_dir, lora=lora()))
    sizes = [{n: (p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in (skeleton, adapted)]
    assert sizes[0] == sizes[1] and all(p.is_meta for p in skeleton.parameters())
    batch = packed(documents)
    assert ScoreModule(model)(batch, per_token=True).shape == (len(documents),)


def test_a_critic_of_another_vocabulary_is_refused(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(384 - len(tokenizer) + 1)])
    with pytest.raises(ConfigError, match="embeddings for 384 tokens, the policy's tokenizer has 385"):
        load_critic(ppo(tiny_model_dir), tokenizer=tokenizer)
    text = (tmp_path / "other" / "tokenizer.json").read_text().replace("<|im_start|>", "<|begin|>")
    (tmp_path / "other" / "tokenizer.json").write_text(text)
    for load in (load_critic, load_critic_skeleton):
        with pytest.raises(ConfigError, match=r"token 1 is '<\|begin\|>' there and '<\|im_start\|>'"):
            load(ppo(tiny_model_dir, critic_model_name_or_path=str(tmp_path / "other")))


CLASSIFIERS = [f for f in (*PACKED, *ONE_BY_ONE) if f not in ("granite", "cohere", "lfm2-conv", "mamba")]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_of_every_family(family):
    """Packed or one by one: transformers' own scores, padded; the padding token is one of those that the self check reads."""
    torch.manual_seed(0)
    config = config_of(family)
    config.num_labels, config.pad_token_id, config._experts_implementation = 1, 3, "eager"
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    train(model)
    documents = rows(61, 3)
    own = torch.cat([model(input_ids=torch.tensor([d])).logits[:, 0].detach() for d in documents])
    padded = theirs(model, documents, "right") if family in PACKED else own
    module = ScoreModule(model)
    assert module.packing == ("packed" if family in PACKED else "one_by_one")
    got = module(packed(documents))
    assert torch.allclose(got, own, atol=1e-5) and torch.allclose(got, padded, atol=1e-4)
    assert model.config.pad_token_id == 3
