"""Log-probs of choices: against a plain forward of one choice at a time, and against lm-eval where it is installed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl.config.benchmark import BenchmarkSpec
from llmrl.errors import DataError
from llmrl.evaluation.benchmarks import Benchmark
from llmrl.evaluation.choices import logprobs, read_choices, result_of, tokens_of
from llmrl.models.forward import PolicyModule
from llmrl.types import Prompt

QUESTIONS = [
    ("What is three times four?", ["twelve", "the answer", "12 because", "it is"], "A"),
    ("Which is warm?  ", ["ice", "a very, very long choice that is likely to lose", "fire"], "C"),
    ("Pick one", ["same", "same", "  spaced  "], "B"),
]


def problem(i, question, texts, answer):
    choices = [{"label": "ABCD"[n], "text": text} for n, text in enumerate(texts)]
    return Prompt(f"q{i}", (), f"Question: {question}\nAnswer:", {"choices": choices, "answer": answer, "level": i})


PROMPTS = [problem(i, *q) for i, q in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval(), AutoTokenizer.from_pretrained(tiny_model_dir)


def slow(model, tokenizer, prompt, text):
    context, continuation = tokens_of(tokenizer, prompt.text, f" {text}")
    with torch.no_grad():
        scores = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    return sum(float(scores[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


def test_each_choice_gets_the_log_prob_of_a_forward_of_its_own(model):
    problems = read_choices(PROMPTS, model[1])
    for budget in (1, 100_000):
        found = logprobs(problems, PolicyModule(model[0]), tokens_per_forward=budget)
        for prompt, sums, (_, texts, _) in zip(PROMPTS, found, QUESTIONS, strict=True):
            assert sums == pytest.approx([slow(*model, prompt, text) for text in texts], abs=1e-4)
    assert found[2][0] == pytest.approx(found[2][1], abs=1e-5)


def test_spaces_before_the_cut_belong_to_the_continuation(model):
    tokenizer = model[1]
    context, continuation = tokens_of(tokenizer, "Which is warm?  ", " ice")
    assert tokenizer.decode(context) == "Which is warm?" and tokenizer.decode(continuation) == "   ice"


def test_both_metrics_stand_beside_each_other_and_the_benchmark_says_which_counts(model):
    problems = read_choices(PROMPTS, model[1])
    spec = {
        "title": "t",
        "data": "d",
        "mode": "choices",
        "prompts": {"p": {"text": "{question}"}},
        "breakdown": "level",
    }
    long, short, other = -10.0, -8.0, -9.0
    found = [[short, long, other, other], [short, long, short - 1], [short, short, other]]
    for metric in ("accuracy", "acc_norm"):
        benchmark = Benchmark("b", BenchmarkSpec(metric=metric, **spec), [])
        result = result_of(benchmark, problems, PROMPTS, found)
        # The second problem's long choice wins by character; of the third's equal ones the first counts, which is wrong.
        assert result.correct == ([1, 0, 0] if metric == "accuracy" else [0, 0, 0])
        assert [row["answers"] for row in result.rows][1] == (["A"] if metric == "accuracy" else ["B"])
        saved = result.to_dict()
        assert saved["acc"]["accuracy"] == pytest.approx(1 / 3) and saved["acc_norm"]["accuracy"] == 0
        assert saved["truncation_rate"] is None and saved["per_row"][0]["logprobs"]["B"] == long


def test_problems_that_are_no_choices_are_refused(model):
    for texts, answer, message in (
        (["a", "b"], "C", "not one of the choices"),
        (["a", "  "], "A", "choice B is empty"),
    ):
        with pytest.raises(DataError, match=message):
            read_choices([problem(0, "q", texts, answer)], model[1])
