"""Exports: the same logits after the way out, whatever the way was; whole or not there; a card that the hub can read."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import llmrl.train.export as export_module
from llmrl.cli.main import main
from llmrl.config.load import dump_recipe
from llmrl.config.model import LoraSettings, ModelFields
from llmrl.config.sft import SFTConfig
from llmrl.models.export import write_export
from llmrl.models.load import load_policy, save_model
from llmrl.models.scorer import load_scorer
from llmrl.models.source import Source
from llmrl.train.checkpoint import CheckpointStore, written

IDS = torch.arange(3, 40)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def plain(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def moved(model):
    """Everything that trains is moved from where it began."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def adapter_of(base, directory, **lora):
    """A saved adapter, and its logits."""
    model = moved(
        get_peft_model(
            plain(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": "all-linear", **lora})
        )
    )
    save_model(model, AutoTokenizer.from_pretrained(base), directory)
    return directory, logits(model)


def run_export(*argv) -> int:
    return main(["export", *map(str, argv)])


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    """A run directory of three steps as a trainer leaves it, the best of which is the first, and the logits of each."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    config = SFTConfig(
        model_name_or_path=str(tiny_model_dir), output_dir=str(out), dataset=["org/chats", "/home/me/secret/rows.jsonl"],
        eval_dataset="org/held", system_prompt="Use ``` for code.",
    )  # fmt: skip
    store, model, found = CheckpointStore(out / "checkpoints"), load_policy(config)[0], {}
    rows = []
    for step in (1, 2, 3):
        moved(model)
        found[step] = logits(model)
        rows.append({"step": step, "loss": 1.0 / step, "eval_loss": 2.0 / step, "eval_accuracy": 0.5, "eval_accuracy_low": 0.4, "eval_accuracy_high": 0.6, "num_tokens": 1000 * step})  # fmt: skip

        directory = store.begin(step)
        save_model(model, AutoTokenizer.from_pretrained(tiny_model_dir), directory / "model")
        (directory / "state.json").write_text(json.dumps({"step": step}))
        (directory / "critic.safetensors").write_bytes(b"a critic")
        store.finish(step, written(directory))
        if step == 1:
            store.call_best(1)
    save_model(model, AutoTokenizer.from_pretrained(tiny_model_dir), out / "model")
    (out / "config.yaml").write_text(dump_recipe(config))
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    versions = {"python": "3.11", "torch": torch.__version__}
    summary = {
        "status": "finished",
        "kind": "sft",
        "step": 3,
        "total_steps": 3,
        "device": "cpu",
        "processes": 1,
        "versions": versions,
    }
    (out / "summary.json").write_text(json.dumps(summary))
    for step, accuracy in ((1, 0.25), (3, 0.75)):
        folder = out / "evaluations" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        result = {
            "benchmark": "gsm8k" if step == 3 else "",
            "n": 40,
            "samples": 4,
            "accuracy": accuracy,
            "interval": [accuracy - 0.1, accuracy + 0.1],
        }
        (folder / "gsm8k.json").write_text(json.dumps(result))
    return out, found


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16", "fp16"])
def test_cast_and_sharded_is_the_model_cast(run, tmp_path, dtype):
    out, found = run
    words = [] if dtype is None else ["--dtype", dtype]
    assert run_export(out, tmp_path / "x", "--max-shard-size", "30KB", *words) == 0
    torch_type = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    loaded = plain(tmp_path / "x")
    assert loaded.dtype == torch_type and len(list((tmp_path / "x").glob("model-*-of-*.safetensors"))) > 2
    assert {t.dtype for f in (tmp_path / "x").glob("*.safetensors") for t in load_file(f).values()} == {torch_type}
    assert torch.equal(logits(loaded), logits(plain(out / "model", dtype=torch_type)))
    assert torch.equal(logits(loaded), found[3]) or torch_type != torch.float32
    assert len({f.stat().st_mode for f in (tmp_path / "x").iterdir()}) == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "x").chat_template


@pytest.mark.parametrize(
    ("lora", "untied"),
    [
        ({}, False),
        ({"use_dora": True, "use_rslora": True}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
    ],
    ids=["plain", "dora", "saved", "embedding", "head"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings")
def test_merged_is_the_adapted_model_also_with_tied_embeddings(tiny_model_dir, tmp_path, lora, untied):
    adapter, want = adapter_of(tiny_model_dir, tmp_path / "a", **lora)
    write_export(str(adapter), tmp_path / "x", merge=True, max_shard_size="1MB")
    assert torch.allclose(logits(plain(tmp_path / "x")), want, atol=1e-4)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["tie_word_embeddings"] != untied
    assert not (tmp_path / "x" / "adapter_config.json").exists()


def test_an_adapter_alone_finds_its_base_from_anywhere(tiny_model_dir, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    GenerationConfig(eos_token_id=5, do_sample=True, temperature=0.7).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    adapter, want = adapter_of("base", tmp_path / "a", r=8)
    assert run_export("a", "x", "--dtype", "bf16") == 0
    monkeypatch.chdir("/")
    assert torch.allclose(logits(PeftModel.from_pretrained(plain(tmp_path / "base"), tmp_path / "x")), want, atol=0.05)
    assert torch.allclose(logits(plain(tmp_path / "x")), want, atol=0.05), "transformers finds base and adapter"
    generation = json.loads((tmp_path / "x" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 5] and generation["temperature"] == 0.7, "the template's end of turn is 2"
    card = (tmp_path / "x" / "README.md").read_text()
    assert "--max-lora-rank 8 --lora-modules" in card and str(tmp_path) not in card
    assert ModelCard(card).data.library_name == "peft"

    dora, _ = adapter_of(tiny_model_dir, tmp_path / "dora", use_dora=True)
    assert run_export(dora, tmp_path / "y") == 0
    assert "vLLM does not take this adapter (use_dora)" in capsys.readouterr().out
    assert "merge it first" in (tmp_path / "y" / "README.md").read_text()

    monkeypatch.chdir(tmp_path)
    other = json.loads((adapter / "adapter_config.json").read_text()) | {"r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(other))
    assert run_export(adapter, tmp_path / "z") == 2
    assert "does not fit its base" in capsys.readouterr().err and not (tmp_path / "z").exists()


def test_an_adapter_remembers_the_revision_of_its_base(tiny_model_dir, tmp_path):
    fields = ModelFields(model_name_or_path=str(tiny_model_dir), model_revision="v2", lora=LoraSettings(r=2))
    save_model(*load_policy(fields), tmp_path / "a")
    assert Source(ModelFields(model_name_or_path=str(tmp_path / "a"))).hub["revision"] == "v2"
    write_export(str(tmp_path / "a"), tmp_path / "x")
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["revision"] == "v2"


def test_what_can_not_be_exported_is_refused_and_leaves_nothing(tiny_model_dir, tmp_path, capsys):
    def refused(words, *argv):
        assert run_export(*argv[:1], tmp_path / "out" / "x", *argv[1:]) == 2
        said = capsys.readouterr().err
        assert words in said, said
        assert not list((tmp_path / "out").glob("*")) or not (tmp_path / "out").exists()

    for name, value in (("large", 1e5), ("broken", float("nan"))):
        shutil.copytree(tiny_model_dir, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.norm.weight"][3] = value
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    refused(
        "model.norm.weight has a value of 1e+05, too large for torch.float16", tmp_path / "large", "--dtype", "fp16"
    )
    refused("training diverged", tmp_path / "broken")
    refused("nothing to merge", tiny_model_dir, "--merge")
    refused("'5 apples' is no size", tiny_model_dir, "--max-shard-size", "5 apples")
    refused("no run's directory", tiny_model_dir, "--checkpoint", "best")
    refused("there is no directory", tmp_path / "nowhere" / "at" / "all")

    shutil.copytree(tiny_model_dir, tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    refused("is quantized", tmp_path / "quantized", "--dtype", "bf16")

    adapter, _ = adapter_of(tiny_model_dir, tmp_path / "a")
    saved = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(saved | {"base_model_name_or_path": "org/gone"}))
    refused("org/gone can't be loaded", adapter, "--merge")
    prefix = get_peft_model(plain(tiny_model_dir), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    save_model(prefix, AutoTokenizer.from_pretrained(tiny_model_dir), tmp_path / "prefix")
    refused("is a PREFIX_TUNING adapter", tmp_path / "prefix", "--merge")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert run_export(tiny_model_dir, tmp_path / "full") == 2 and "not an empty directory" in capsys.readouterr().err


def test_a_run_s_checkpoints_by_name(run, tmp_path, capsys):
    out, found = run
    sources = {
        "best": (out, "--checkpoint", "best"), "latest": (out, "--checkpoint", "latest"), "2": (out, "--checkpoint", "2"),
        "final": (out,), "model": (out / "model",), "checkpoint": (out / "checkpoints" / "step_00000002",),
        "model of one": (out / "checkpoints" / "step_00000002" / "model",),
    }  # fmt: skip
    steps = {"best": 1, "latest": 3, "2": 2, "final": 3, "model": 3, "checkpoint": 2, "model of one": 2}
    for name, (source, *more) in sources.items():
        assert run_export(source, tmp_path / name, *more) == 0
        assert torch.equal(logits(plain(tmp_path / name)), found[steps[name]]), name
        assert f"step {steps[name]} of 3" in (tmp_path / name / "README.md").read_text()
        assert not list(tmp_path.glob("*/critic*")), "the critic is for training alone"
    capsys.readouterr()
    for which, words in (
        ("7", "no checkpoint of step 7; it has those of steps 1, 2, 3"),
        ("newest", "neither best, latest nor a step"),
    ):
        assert run_export(out, tmp_path / "x", "--checkpoint", which) == 2
        assert words in capsys.readouterr().err

    copy = tmp_path / "unfinished"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "model")
    (copy / "checkpoints" / "best").unlink()
    (copy / "checkpoints" / "step_00000002" / "model" / "config.json").write_text("{}")
    for words, more in (
        ("no final model: the run is at step 3 of 3", ()),
        ("no best checkpoint", ("--checkpoint", "best")),
    ):
        assert run_export(copy, tmp_path / "x", *more) == 2
        assert words in capsys.readouterr().err
    assert run_export(copy, tmp_path / "x", "--checkpoint", "2") == 2
    assert "not a whole checkpoint: model/config.json" in capsys.readouterr().err


def test_a_kill_leaves_nothing_that_looks_like_a_model(tiny_model_dir, tmp_path, monkeypatch, capsys):
    output = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_card", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if child == 0:  # dies with everything but the card written
            try:
                run_export(tiny_model_dir, output)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".tmp_x"] and (tmp_path / ".tmp_x" / "model.safetensors").exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "publish", full)
        assert run_export(tiny_model_dir, output) == 2
    assert "No space left" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    output.mkdir()
    assert run_export(tiny_model_dir, output) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and torch.equal(
        logits(plain(output)), logits(plain(tiny_model_dir))
    )


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)], ids=["whole", "adapter"])
def test_a_reward_model_stays_a_classifier(tiny_model_dir, tmp_path, lora):
    model, tokenizer = load_scorer(ModelFields(model_name_or_path=str(tiny_model_dir), lora=lora))
    want = logits(moved(model))
    save_model(model, tokenizer, tmp_path / "rm")
    assert run_export(tmp_path / "rm", tmp_path / "x", *(["--merge"] if lora else [])) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "x")
    assert loaded.config.num_labels == 1 and torch.allclose(logits(loaded), want, atol=1e-5)
    data = ModelCard.load(tmp_path / "x" / "README.md").data
    assert data.pipeline_tag == "text-classification" and "reward-model" in data.tags
    if lora:
        assert run_export(tmp_path / "rm", tmp_path / "adapter") == 0
        on_base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1, pad_token_id=0)
        assert torch.allclose(logits(PeftModel.from_pretrained(on_base, tmp_path / "adapter")), want, atol=1e-5)


def test_the_card_says_what_the_hub_asks_for(run, tiny_model_dir, tmp_path):
    out, _ = run
    # The base was itself exported from something on the hub.
    (tiny_model_dir / "README.md").write_text("---\nbase_model: org/first\n---\n")
    try:
        assert run_export(out, tmp_path / "x", "--dtype", "bf16") == 0
        assert run_export(out, tmp_path / "best", "--checkpoint", "best") == 0
    finally:
        (tiny_model_dir / "README.md").unlink()
    card = ModelCard.load(tmp_path / "x" / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.datasets) == (
        "org/first",
        "transformers",
        ["org/chats"],
    )
    assert card.data.tags == ["llmrl", "sft"] and card.data.license is None
    results = {(r.dataset_name, r.metric_type): r for r in card.data.eval_results}
    assert (
        results["gsm8k", "accuracy"].metric_value == 0.75
        and results["gsm8k", "accuracy"].metric_name == "accuracy (avg@4)"
    )
    assert results["gsm8k", "accuracy"].metric_args == {"interval": [0.65, 0.85], "problems": 40, "samples": 4}
    assert results["org/held", "accuracy"].metric_args == {"interval": [0.4, 0.6]}
    assert results["org/held", "loss"].metric_value == round(2 / 3, 6) and len(results) == 3
    assert "/home/me" not in card.content and str(tmp_path.parent) not in card.content
    assert "vllm serve x" in card.text and f"torch {torch.__version__}" in card.text
    recipe = card.text.partition("````yaml\n")[2].partition("````\n")[0]
    assert yaml.safe_load(recipe)["learning_rate"] == SFTConfig.model_fields["learning_rate"].default
    best = ModelCard.load(tmp_path / "best" / "README.md").data.eval_results
    assert [r.metric_value for r in best if r.dataset_name == "gsm8k"] == [0.25], "those of that step"
