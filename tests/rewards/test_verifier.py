"""The reward `verifier`: each row is judged by what its column names, and what can't be is refused before training."""

from __future__ import annotations

import json

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.errors import ConfigError
from llmrl.rewards.puzzles import knights_and_knaves, read_kinds
from llmrl.rewards.runner import RewardRunner
from llmrl.rewards.verifier import NAMES, OPEN_INSTRUCT, verifier
from tests.rewards.conftest import rollout

TESTS = json.dumps(["assert double(2) == 4", "assert double(0) == 0"])
GOOD, BAD = "```python\ndef double(x):\n    return 2 * x\n```", "```python\ndef double(x):\n    return x\n```"
HUMAN_EVAL = {"entry_point": "double", "test": "def check(candidate):\n    assert candidate(2) == 4\n"}
INSTRUCTIONS = "[{'instruction_id': ['punctuation:no_comma', 'startend:quotation'], 'kwargs': [None, None]}]"


def prompt_of(**columns):
    return rollout("", **columns).prompt


@pytest.mark.parametrize(
    ("columns", "right", "wrong"),
    [
        ({"verifier": "math_answer", "answer": "1/2"}, r"so \boxed{0.5}", r"\boxed{2}"),
        ({"verifier": "gsm8k", "answer": "72"}, "She has 72.", "She has 73."),
        ({"verifier": "exact_match", "answer": "19"}, "Answer: 19", "Answer: 18"),
        ({"verifier": "multiple_choice", "answer": "B", "choices": ["yes", "no"]}, "The answer is B.", "The answer is A."),
        ({"verifier": "instructions", "answer": "", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "no", "no, yes"),
        ({"verifier": "string_f1", "answer": "the Nile"}, "Nile", "Rhine"),
        ({"verifier": "text_match", "answer": "Nile"}, "Answer: the Nile", "Answer: the Rhine"),
        ({"verifier": "sat_assignment", "answer": "x1 = true", "clauses": [[1]]}, "x1 = true", "x1 = false"),
        ({"verifier": "knights_and_knaves", "answer": "Ann is a knight, Bob is a knave"}, "Bob: knave, Ann: knight", "Ann is a knight"),
        ({"verifier": "ifeval", "answer": INSTRUCTIONS}, '"no comma"', 'a, b'),
    ],
)  # fmt: skip
def test_each_row_by_its_own(columns, right, wrong):
    assert verifier.check_gold(**columns) is None
    assert verifier.score(right, **columns) == 1.0
    assert verifier.score(wrong, **columns) == 0.0


def test_arguments_of_one_verifier():
    columns = {
        "verifier": "instructions",
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    }
    assert verifier.score("no comma", **columns) == 0.0
    assert verifier.score("no comma", **columns, options={"instructions": {"partial": True}}) == 0.5
    assert verifier.score("no comma", verifier="ifeval", answer=INSTRUCTIONS) == 0.5  # open-instruct gives the share


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code_test": {}}, "did you mean code_tests"),
        ({"code_tests": {"partail": True}}, "did you mean 'partial'"),
        ({"code_tests": True}, "needs a mapping"),
        ({"code_tests": {"seconds": -1}}, "positive"),
        ("code", "must be a mapping"),
    ],
)
def test_options_are_checked_at_load(options, message):
    with pytest.raises(ConfigError, match=message):
        RewardRunner([RewardSpec(function="verifier", args={"options": options})])


def test_an_unknown_name_is_refused_at_load_with_near_ones():
    with RewardRunner([RewardSpec(function="verifier", isolate="inline")]) as runner:
        rows = [prompt_of(verifier="math_anwser", answer="4"), prompt_of(verifier="math", answer="4")]
        with pytest.raises(
            ConfigError, match=r"1 row of the data: no verifier 'math_anwser': did you mean math_answer"
        ):
            runner.check_golds(rows)
        with pytest.raises(ConfigError, match="no verifier None"):
            runner.check_golds([prompt_of(answer="4", verifier=None)])
        with pytest.raises(ConfigError, match="needs the column 'verifier'"):
            runner.check_golds([prompt_of(answer="4")])


def test_code_is_run_only_where_that_is_allowed():
    row = {"verifier": "code", "answer": TESTS}
    spec = RewardSpec(function="verifier", isolate="inline")
    with RewardRunner([spec]) as runner:
        with pytest.raises(ConfigError, match=r"1 rows? .*verifier 'code'.*allow_code_execution: true"):
            runner.check_golds([prompt_of(**row)])
        with pytest.raises(ConfigError, match="allow_code_execution"):
            runner.score([rollout(GOOD, **row)])


def test_a_mixture_in_workers():
    mixture = [
        (GOOD, {"verifier": "code", "answer": TESTS}, 1.0),
        (BAD, {"verifier": "code_tests", "answer": "", "tests": json.loads(TESTS)}, 0.5),
        ("```python\nprint(int(input()) + 1)\n```", {"verifier": "code_stdio", "answer": [{"input": "1", "output": "2"}]}, 1.0),
        ("    return 2 * x\n", {"verifier": "code_tests", "code_prompt": "def double(x):\n", **HUMAN_EVAL}, 1.0),
        (r"\boxed{\frac{2}{4}}", {"verifier": "math", "answer": "0.5"}, 1.0),
        ("(C)", {"verifier": "multiple_choice", "answer": "B"}, 0.0),
    ]  # fmt: skip
    spec = RewardSpec(function="verifier", args={"options": {"code_tests": {"partial": True}}})
    with RewardRunner([spec], allow_code_execution=True, workers=1) as runner:
        assert runner.check_golds([prompt_of(**columns) for _, columns, _ in mixture]) == []
        (bad,) = runner.check_golds([prompt_of(verifier="multiple_choice", answer="?")])
        assert "is no choice" in bad.reason
        scored = runner.score([rollout(text, **columns) for text, columns, _ in mixture])
    assert [row.reward for row in scored] == [value for *_, value in mixture]


def test_names_are_there():
    from llmrl.rewards.load import BUILTINS

    assert set(NAMES) <= BUILTINS.keys() and {name for name, _ in OPEN_INSTRUCT.values()} <= set(NAMES)


def test_knights_and_knaves_reads_the_conclusion():
    gold = "Zoey is a knave, Oliver is a knight"
    text = "If Zoey is a knight then Oliver is a knave, a contradiction.\n\nSo **Zoey** is a **knave** and Oliver is a knight."
    assert knights_and_knaves.score(text, gold) == 1.0
    assert knights_and_knaves.score(f"<think>{text}", gold) == 0.0  # it never began to answer
    assert knights_and_knaves.score("<answer>(1) Zoey is a knave\n(2) Oliver is a knight</answer>", gold) == 1.0
    assert knights_and_knaves.score("Zoey is a knave, Oliver is a knight, Oliver is a knave.", gold) == 0.0
    assert knights_and_knaves.score("Zoey is a knave.", gold) == 0.0
    assert knights_and_knaves.score("Zoey is a knave and Oliver is not a knight.", gold) == 0.0
    assert read_kinds("Ann is a knight; ann = knave") == {"ann": {"knight", "knave"}}
    assert "does not say" in knights_and_knaves.check_gold(answer="Ann is tall")


def test_the_recipe_trains_on_a_mixture_of_records(tiny_model_dir, tmp_path):
    from llmrl.algorithms.grpo import GRPOTrainer
    from llmrl.config.load import load_recipe

    def record(n, verifier, answer="", **meta):
        messages = [{"role": "user", "content": "Say something."}]
        return {"id": f"r{n}", "source": "", "messages": messages, "answer": answer, "verifier": verifier, "meta": meta}

    rows = [
        record(0, "math_answer", "2"),
        record(1, "code_tests", tests=json.loads(TESTS)),
        record(2, "instructions", instruction_id_list=["punctuation:no_comma"], kwargs=[{}]),
        record(3, "knights_and_knaves", "Ann is a knight"),
    ]
    path = tmp_path / "mix.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "model_name_or_path": tiny_model_dir, "output_dir": tmp_path / "run", "max_steps": 1, "batch_size": 4, "num_generations": 2,
        "max_completion_length": 8, "reward_workers": 1, "dataset": f"[{path}]", "mixed_precision": "no",
        "gradient_checkpointing": "false",
    }  # fmt: skip
    GRPOTrainer(load_recipe("grpo", "qwen2.5-1.5b-mixture-grpo", [f"{k}={v}" for k, v in overrides.items()])).train()
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["reward_outcomes/verifier/score"] == 8
    assert {name for name in line if name.startswith("verifier/")} == {f"verifier/{row['verifier']}" for row in rows}
