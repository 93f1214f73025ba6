"""Two steps of the shipped recipes on math and on instructions with a small model, and what they leave to be read."""

from __future__ import annotations

import json

import pytest

from llmrl.algorithms.grpo import GRPOTrainer
from llmrl.config.load import load_recipe

SMALL = ["batch_size=2", "num_generations=2", "max_completion_length=8", "max_prompt_length=200", "max_steps=2", "mixed_precision=no",
         "gradient_checkpointing=false", "reward_workers=1", "report_to=[]"]  # fmt: skip
MATH = {"answer": "12"}
INSTRUCTIONS = {
    "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
    "kwargs": [None, {}],
}


@pytest.mark.parametrize(
    ("name", "columns", "function", "note"),
    [
        ("qwen2.5-1.5b-gsm8k-grpo", MATH, "math_answer", ""),
        ("qwen2.5-1.5b-instructions-grpo", INSTRUCTIONS, "instructions", "not followed: startend:quotation"),
    ],
    ids=["math", "instructions"],
)
def test_two_steps_of_a_shipped_recipe(name, columns, function, note, tiny_model_dir, tmp_path):
    config = load_recipe("grpo", name, [f"model_name_or_path={tiny_model_dir}", f"output_dir={tmp_path}", *SMALL])
    rows = [
        {("question" if name.endswith("gsm8k-grpo") else "prompt"): text, **columns}
        for text in ("three times four", "what is twelve?")
    ]
    GRPOTrainer(config, train_dataset=rows).train()
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2]
    assert all(s[f"reward_outcomes/{function}/score"] == 4 for s in steps)
    samples = [json.loads(line) for file in (tmp_path / "samples").glob("*.jsonl") for line in file.open()]
    assert samples
    for s in samples:
        assert s["parts"].keys() == s["outcomes"].keys() == s["milliseconds"].keys()
        assert note in s["notes"].get(function, "")
    scheduled = [i for i in steps[0] if i.startswith("reward_weight/")]
    if function == "instructions":
        assert [s["reward_weight/repetition_penalty"] for s in steps] == pytest.approx([0.004, 0.008])
    else:
        assert not scheduled, "its weights do not change"
