"""What an SFT run takes, records and says, beside the numbers of its loss."""

from __future__ import annotations

import json

import pytest

from llmrl.algorithms.sft import SFTTrainer
from llmrl.cli.main import main
from llmrl.config.sft import SFTConfig
from llmrl.errors import ConfigError

ROWS = [{"prompt": f"the answer to {i}", "completion": f" is {i}" + " because" * i} for i in range(6)]


def config(model, out, **settings):
    defaults = {"batch_size": 6, "max_steps": 1, "learning_rate": 0.0}
    return SFTConfig(model_name_or_path=str(model), output_dir=str(out), **{**defaults, **settings})


def test_a_step_of_several_updates_records_their_mean(tiny_model_dir, tmp_path):
    trainer = SFTTrainer(config(tiny_model_dir, tmp_path, updates_per_step=3, shuffle=False), train_dataset=ROWS)
    trainer.train()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    parts = [trainer.update(trainer.examples[i : i + 2]) for i in (0, 2, 4)]  # the rate is 0: nothing has changed
    for key in ("loss", "grad_norm"):
        assert line[key] == pytest.approx(sum(part[key] for part in parts) / 3, rel=1e-5)
    assert len({part["loss"] for part in parts}) == 3


def test_what_was_dropped_is_said(tiny_model_dir, tmp_path, capsys):
    SFTTrainer(config(tiny_model_dir, tmp_path, max_length=12), train_dataset=ROWS, eval_dataset=ROWS[:2])
    said = capsys.readouterr().out
    assert "training data: 6 rows -> " in said and " dropped" in said and "evaluation data: 2 rows -> 2" in said


def test_examples_and_rows_mix(tiny_model_dir, tmp_path):
    examples = SFTTrainer(config(tiny_model_dir, tmp_path / "a"), train_dataset=ROWS).examples
    trainer = SFTTrainer(config(tiny_model_dir, tmp_path / "b"), train_dataset=examples, eval_dataset=ROWS[:2])
    assert len(trainer.examples) == 6 and len(trainer.eval_examples) == 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    recipe = config(tiny_model_dir, tmp_path / "c", eval_dataset=str(tmp_path / "rows.jsonl"))
    assert len(SFTTrainer(recipe, train_dataset=examples).eval_examples) == 3
    assert len(SFTTrainer(recipe, train_dataset=ROWS, eval_dataset=examples[:2]).eval_examples) == 2
    with pytest.raises(ConfigError, match="eval_fraction can't hold out"):
        SFTTrainer(config(tiny_model_dir, tmp_path / "d", eval_fraction=0.5), train_dataset=examples)


def test_an_output_directory_that_is_a_file(tiny_model_dir, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["sft", f"model_name_or_path={tiny_model_dir}", f"dataset={data}", f"output_dir={data}"]) == 2
    assert "is a file" in capsys.readouterr().err
