"""Models and tokenizers in, adapters, references, stop tokens, and the way back to disk."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl.config.model import LoraSettings, ModelFields
from llmrl.errors import ConfigError
from llmrl.models.export import write_export
from llmrl.models.forward import PolicyModule
from llmrl.models.load import (
    disable_dropout,
    load_policy,
    load_reference,
    load_skeleton,
    read_weights,
    save_model,
    stop_token_ids,
)
from llmrl.models.weights import full_parameters
from tests.conftest import CHATML
from tests.models.families import batch_of, furthest, gradients, make


def fields(path, **changes) -> ModelFields:
    return ModelFields(model_name_or_path=str(path), **changes)


def lora(**changes) -> LoraSettings:
    return LoraSettings(**{"r": 4, "lora_alpha": 8.0, **changes})


def train(model) -> None:
    """Moves everything trainable away from where it began: an adapter begins as no change at all."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None], use_cache=False).logits


def plain(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path)


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
}


def test_policy_as_saved(tiny_model_dir):
    model, tokenizer = load_policy(fields(tiny_model_dir), device="cpu")
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert torch.equal(logits(model), logits(plain(tiny_model_dir)))
    assert tokenizer.chat_template == CHATML
    assert next(load_policy(fields(tiny_model_dir, dtype="bfloat16"))[0].parameters()).dtype == torch.bfloat16


def test_chat_template_inline_or_from_a_file(tiny_model_dir, tmp_path):
    template = "{{ messages[0]['content'] }}"
    (tmp_path / "t.jinja").write_text(template)
    for given in (template, str(tmp_path / "t.jinja")):
        assert load_policy(fields(tiny_model_dir, chat_template=given))[1].chat_template == template
    with pytest.raises(ConfigError, match="'chatml' is neither a Jinja template"):
        load_policy(fields(tiny_model_dir, chat_template="chatml"))


def test_what_is_missing_is_named(tiny_model_dir, tmp_path):
    for name in ("./nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match="there is no directory"):
            load_policy(fields(name))
    with pytest.raises(ConfigError, match=r"without config.json or adapter_config.json"):
        load_policy(fields(tmp_path))
    with pytest.raises(ConfigError, match=r"nobody/nothing can't be loaded"):
        load_policy(fields("nobody/nothing"))
    bare = tmp_path / "bare"
    plain(tiny_model_dir).save_pretrained(bare)
    with pytest.raises(ConfigError, match=r"tokenizer_name_or_path: .* has no tokenizer"):
        load_policy(fields(bare))
    assert len(load_policy(fields(bare, tokenizer_name_or_path=str(tiny_model_dir)))[1]) > 256


def test_a_checkpoint_that_is_not_whole_is_refused(tiny_model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model_dir, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of the model's tensors, model.layers.1.mlp.up_proj.weight"):
        load_policy(fields(tmp_path / "m"))


def test_a_tokenizer_of_another_model_is_refused(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(200)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"tokens, the model embeddings for 384"):
        load_policy(fields(tiny_model_dir, tokenizer_name_or_path=str(tmp_path)))


def test_a_tokenizer_that_transformers_rebuilds_is_warned_about(tmp_path, tiny_model_dir, tiny_tokenizer):
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    tiny_tokenizer.backend_tokenizer.pre_tokenizer, kept = (
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), tiny_tokenizer.backend_tokenizer.pre_tokenizer]),
        tiny_tokenizer.backend_tokenizer.pre_tokenizer,
    )
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    tiny_tokenizer.backend_tokenizer.pre_tokenizer = kept
    with pytest.warns(UserWarning, match="as a Qwen2Tokenizer, which splits text differently"):
        load_policy(fields(tmp_path / "m"))


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ConfigError, match="'t5' is an encoder-decoder"):
        load_policy(fields(tmp_path))


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_come_back(tiny_model_dir, tmp_path, variant):
    model, tokenizer = load_policy(fields(tiny_model_dir, lora=lora(**VARIANTS[variant])))
    assert torch.allclose(logits(model), logits(plain(tiny_model_dir)), atol=1e-6)
    train(model)
    want = logits(model)
    assert not torch.allclose(want, logits(plain(tiny_model_dir)), atol=1e-2)
    save_model(model, tokenizer, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()

    again = PeftModel.from_pretrained(plain(tiny_model_dir), tmp_path / "adapter")
    assert torch.allclose(logits(again), want, atol=1e-6)
    continued, own = load_policy(fields(tmp_path / "adapter"))
    assert torch.equal(logits(continued), want) and own.chat_template == CHATML
    assert any(p.requires_grad for n, p in continued.named_parameters() if "lora_" in n)
    fresh, _ = load_policy(fields(tiny_model_dir, lora=lora(**VARIANTS[variant])))
    fresh.load_state_dict(read_weights(fresh, tmp_path / "adapter"), strict=False)
    assert torch.equal(logits(fresh), want)

    write_export(str(tmp_path / "adapter"), tmp_path / "merged", merge=True)
    merged = plain(tmp_path / "merged")
    assert torch.allclose(logits(merged), want, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHATML
    stream = dict(full_parameters(model))
    assert stream.keys() == dict(merged.named_parameters()).keys()
    assert all(torch.allclose(stream[n], p, atol=1e-6) for n, p in merged.named_parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_is_the_model_without_its_adapter(tiny_model_dir, variant):
    model, _ = load_policy(fields(tiny_model_dir, lora=lora(**VARIANTS[variant])))
    module, base = PolicyModule(model), PolicyModule(plain(tiny_model_dir))
    train(model)
    assert load_reference(fields(tiny_model_dir), model) is None
    batch = batch_of()
    scores = module(batch, reference=True)
    assert not scores.logprobs.requires_grad
    assert torch.allclose(scores.logprobs, base(batch).logprobs, atol=1e-6)
    now = module(batch).logprobs
    assert not torch.allclose(now, scores.logprobs, atol=1e-2)
    now.sum().backward()
    found = gradients(module)
    assert found and all("lora_" in n or "modules_to_save" in n for n in found)
    with pytest.raises(ConfigError, match="it has none"):
        base(batch, reference=True)


def test_adapters_packed_equal_one_by_one_and_checkpointed(tiny_model_dir):
    from llmrl.data.packing import pack
    from tests.models.families import examples

    found = []
    for checkpointing in (False, True):
        model, _ = load_policy(fields(tiny_model_dir, lora=lora(), gradient_checkpointing=checkpointing))
        train(model)
        module = PolicyModule(model)
        for rows in ([examples()], [[row] for row in examples()]):
            for part in rows:
                batch = pack(part)
                (module(batch).logprobs * batch.select("weights").float()).sum().backward()
            found.append(gradients(module))
    assert furthest(found[1], found[0]) < 1e-5
    assert furthest(found[2], found[0]) < 1e-6


def test_an_adapter_on_the_head_is_refused(tiny_model_dir):
    model, _ = load_policy(fields(tiny_model_dir, lora=lora(target_modules=["q_proj", "lm_head"])))
    with pytest.raises(ConfigError, match=r"leave lm_head out of target_modules"):
        PolicyModule(model)


def test_adapter_settings_that_do_not_fit(tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"lora: .*no_such_layer"):
        load_policy(fields(tiny_model_dir, lora=lora(target_modules=["no_such_layer"])))
    model, tokenizer = load_policy(fields(tiny_model_dir, lora=lora()))
    save_model(model, tokenizer, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"r=4, lora_alpha=8\.0, the recipe asks for r=16"):
        load_policy(fields(tmp_path / "a", lora=LoraSettings()))
    with pytest.raises(ConfigError, match="there is nothing to merge"):
        write_export(str(tiny_model_dir), tmp_path / "b", merge=True)


def test_full_models_come_back(tiny_model_dir, tmp_path):
    model, tokenizer = load_policy(fields(tiny_model_dir))
    PolicyModule(model)
    train(model)
    save_model(model, tokenizer, tmp_path / "m")
    assert torch.equal(logits(plain(tmp_path / "m")), logits(model))
    assert "llmrl" not in (tmp_path / "m" / "config.json").read_text()
    other, _ = load_policy(fields(tiny_model_dir))
    before = {n: p.data_ptr() for n, p in other.named_parameters()}
    other.load_state_dict(read_weights(other, tmp_path / "m"), strict=False)
    assert torch.equal(logits(other), logits(model))
    assert before == {n: p.data_ptr() for n, p in other.named_parameters()}, "an optimizer holds these tensors"
    assert other.lm_head.weight is other.model.embed_tokens.weight
    save_model(model, tokenizer, tmp_path / "zeros", {n: torch.zeros_like(t) for n, t in model.state_dict().items()})
    assert not any(p.any() for p in plain(tmp_path / "zeros").parameters())
    assert all(torch.equal(t, dict(model.named_parameters())[n]) for n, t in full_parameters(model))


def test_the_reference_stays_what_the_policy_was(tiny_model_dir):
    config = fields(tiny_model_dir)
    model, _ = load_policy(config)
    module = PolicyModule(model)
    reference = load_reference(config, model)
    before = module(batch_of()).logprobs
    train(model)
    assert torch.allclose(PolicyModule(reference)(batch_of()).logprobs, before, atol=1e-6)
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())


def test_disable_dropout():
    model = make("gpt2").train()
    model.model_dropout = 0.5
    from llmrl.models.source import new_adapter

    adapted = new_adapter(make("qwen2"), lora(lora_dropout=0.5), 0).train()
    adapted.get_base_model().model.layers[0].self_attn.attention_dropout = 0.5
    for m in (model, adapted):
        module = PolicyModule(m)
        train(m)
        assert not torch.equal(module(batch_of()).logprobs, module(batch_of()).logprobs)
        disable_dropout(m)
        assert torch.equal(module(batch_of()).logprobs, module(batch_of()).logprobs)


def test_skeletons_have_shapes_and_stop_tokens_but_no_weights(tiny_model_dir, tmp_path):
    for settings in (None, lora()):
        config = fields(tiny_model_dir, lora=settings)
        skeleton, tokenizer = load_skeleton(config)
        model, _ = load_policy(config)
        assert all(p.is_meta for p in skeleton.parameters())
        sizes = [{n: (p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in (skeleton, model)]
        assert sizes[0] == sizes[1]
        assert stop_token_ids(skeleton, tokenizer) == stop_token_ids(model, tokenizer)
    save_model(model, tokenizer, tmp_path)
    continued, _ = load_skeleton(fields(tmp_path))
    assert {n for n, _ in continued.named_parameters()} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("listed", [None, 1, [1, 0]])
def test_stop_tokens_are_those_of_config_tokenizer_and_template(tiny_model_dir, listed):
    model, tokenizer = load_policy(fields(tiny_model_dir))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    model.generation_config.eos_token_id = listed
    want = {2} | ({listed} if isinstance(listed, int) else set(listed or ()))
    assert set(stop_token_ids(model, tokenizer)) == want  # the template ends a turn with the eos
    tokenizer.chat_template = CHATML.replace("<|im_end|>{% endgeneration", "<|eot|>{% endgeneration")
    assert set(stop_token_ids(model, tokenizer)) == want | {eot}
    # Plain text behind the answer, a template for other conversations, none at all: nothing more to stop at.
    for template in ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "{{ raise_exception('no') }}", None):
        tokenizer.chat_template = template
        assert set(stop_token_ids(model, tokenizer)) == want
