"""The data scripts: raw rows as published become records, what can't be read is refused, and nothing that is evaluated is trained on."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.config.data import DatasetSource
from llmrl.config.reward import RewardSpec
from llmrl.data.puzzles import MAKERS, generate
from llmrl.data.schemas import read_prompts
from llmrl.data.sources import load_rows
from llmrl.errors import DataError
from llmrl.evaluation.benchmarks import load_spec, shipped
from llmrl.rewards.runner import RewardRunner
from llmrl.types import Completion, Prompt, Rollout

from .conftest import shared_data

SCRIPTS = Path(__file__).resolve().parents[1] / "data_scripts"
USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("user", "Hi?"), ("assistant", "Hello")))
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without "
    'quotes) where $Answer is the answer to the problem.\n\nWhat is $1+1$?\n\nRemember to put your answer on its own line after "Answer:".'
)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """script(NAME, ARGS or rows...) runs a script here and returns (rows written, what it printed)."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def run(name, *args, rows=None, out="out/rows.jsonl"):
        if rows is not None:
            raw = tmp_path / "raw.jsonl"
            raw.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            args = ("--source", str(raw), *args)
        path = tmp_path / out
        monkeypatch.setattr(sys, "argv", [name, *map(str, args), "--output", str(path)])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        return lines(path), capsys.readouterr().out

    return run


@pytest.fixture
def hub(monkeypatch):
    """hub(rows) puts rows where the hub would be; what was asked for is in the list that it returns."""
    import datasets

    def put(rows):
        asked = []
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda path, name=None, data_dir=None, split=None: (
                asked.append((path, name, data_dir, split)) or list(rows)
            ),
        )
        return asked

    return put


def record(id, source, question, answer, verifier, **meta):
    messages = [{"role": "user", "content": question}]
    return {"id": id, "source": source, "messages": messages, "answer": answer, "verifier": verifier, "meta": meta}


def pair(id, source, prompt, chosen, rejected, **more):
    said = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return {"id": id, "source": source, "prompt": prompt, "chosen": said[0], "rejected": said[1], **more}


# script, arguments, what is asked of the hub, a raw row, what it becomes
TRAINING = [
    (
        "gsm8k", [], ("openai/gsm8k", "main", None, "train"),
        {"question": "How many?", "answer": "3*4=<<3*4=12>>12\n#### 1,012"},
        record("gsm8k/train/00000", "GSM8K train", "How many?", "1012", "math_answer", solution="3*4=<<3*4=12>>12"),
    ),
    (
        "dapo_math", [], ("BytedTsinghua-SIA/DAPO-Math-17k", None, None, "train"),
        {"data_source": "math_dapo", "prompt": [{"content": DAPO, "role": "user"}], "ability": "MATH",
         "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "9a9b"}},
        record("dapo-math/9a9b", "DAPO-Math-17k", "What is $1+1$?", "2", "math_answer"),
    ),
    (
        "dapo_math", ["--source", "open-r1/DAPO-Math-17k-Processed"], ("open-r1/DAPO-Math-17k-Processed", None, None, "train"),
        {"prompt": "What is $1+1$?", "solution": "2", "extra_info": {"index": "9a9b"}},
        record("dapo-math/9a9b", "DAPO-Math-17k", "What is $1+1$?", "2", "math_answer"),
    ),
    (
        "open_reasoner_zero", [], ("Open-Reasoner-Zero/orz_math_57k_collection", None, None, "train"),
        {"0": {"from": "human", "value": "1+1?"}, "1": {"from": "assistant", "ground_truth": {"value": "2"}}},
        record("orz-57k/00000", "Open-Reasoner-Zero 57k", "1+1?", "2", "math_answer"),
    ),
    (
        "deepscaler", [], ("agentica-org/DeepScaleR-Preview-Dataset", None, None, "train"),
        {"problem": "1+1?", "answer": "2", "solution": ""},
        record("deepscaler/0", "DeepScaleR-Preview", "1+1?", "2", "math_answer"),
    ),
    (
        "big_math", [], ("SynthLabsAI/Big-Math-RL-Verified", None, None, "train"),
        {"problem": "1+1?", "answer": "2", "source": "orca_math", "domain": ["Mathematics"], "llama8b_solve_rate": 0.5},
        record("bigmath/0", "Big-Math-RL-Verified", "1+1?", "2", "math_answer", origin="orca_math", domain=["Mathematics"], llama8b_solve_rate=0.5),
    ),
    (
        "if_multi_constraints", [], ("allenai/IF_multi_constraints_upto5", None, None, "train"),
        {"key": "k1", "messages": [USER], "dataset": "ifeval", "constraint_type": "multi", "constraint": "No commas.",
         "ground_truth": "[{'instruction_id': ['punctuation:no_comma', 'detectable_format:title'], 'kwargs': [None, {}]}]"},
        record("if-multi/k1", "IF multi-constraints", "Hi?", "", "instructions",
               instruction_id_list=["punctuation:no_comma", "detectable_format:title"], kwargs=[{}, {}], instructions=2),
    ),
    (
        "acecode", [], ("TIGER-Lab/AceCode-87K", None, None, "train"),
        {"id": "oss_7", "source": "oss", "question": "Write f.", "test_cases": ["assert f(1) == 2"], "context_messages": [],
         "inferences": [{"model_name": "m", "completion": "c", "pass_rate": 1.0}, {"model_name": "m", "completion": "c", "pass_rate": 0.5}]},
        record("acecode/oss_7", "AceCode-87K", "Write f.", "", "code_tests", tests=["assert f(1) == 2"], origin="oss", pass_rate=0.75),
    ),
    (
        "mbpp", [], ("google-research-datasets/mbpp", "sanitized", None, "train"),
        {"task_id": 602, "prompt": "Add. ", "code": "def add(): pass", "test_imports": [], "test_list": ["assert add()"], "source_file": "x"},
        record("mbpp/602", "MBPP sanitized", "Add. ", "", "code_tests", tests=["assert add()"], test_imports=[], canonical_solution="def add(): pass"),
    ),
    (
        "tulu3_sft", [], ("allenai/tulu-3-sft-mixture", None, None, "train"),
        {"id": "a1", "messages": [USER, ASSISTANT], "source": "ai2-adapt-dev/no_robots_converted"},
        {"id": "tulu3/a1", "source": "ai2-adapt-dev/no_robots_converted", "messages": [USER, ASSISTANT], "answer": "", "verifier": "", "meta": {}},
    ),
    (
        "convert_sft", ["--prefix", "alpaca"], ("tatsu-lab/alpaca", None, None, "train"),
        {"instruction": "Say", "input": "hello", "output": "Hello", "text": "Below is an instruction ..."},
        {"id": "alpaca/000000", "source": "alpaca", "messages": [{"role": "user", "content": "Say\n\nhello"}, ASSISTANT], "answer": "", "verifier": "", "meta": {}},
    ),
    (
        "convert_sft", ["--source", "a/sharegpt"], ("a/sharegpt", None, None, "train"),
        {"id": "x", "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello"}], "lang": "en"},
        {"id": "x", "source": "sft", "messages": [USER, ASSISTANT], "answer": "", "verifier": "", "meta": {"lang": "en"}},
    ),
    (
        "hh_rlhf", [], ("Anthropic/hh-rlhf", None, "harmless-base", "train"),
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello\n\nthere ", "rejected": "\n\nHuman: Hi?\n\nAssistant: What"},
        pair("hh-harmless-base/train/00000", "HH-RLHF harmless-base train", [USER], "Hello\n\nthere", "What"),
    ),
    (
        "ultrafeedback", [], ("HuggingFaceH4/ultrafeedback_binarized", None, None, "train_prefs"),
        {"prompt": "Hi?", "prompt_id": "f0", "chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "What"}],
         "messages": [USER, ASSISTANT], "score_chosen": 8.0, "score_rejected": 3.5},
        pair("ultrafeedback/f0", "UltraFeedback", [USER], "Hello", "What", score_chosen=8.0, score_rejected=3.5),
    ),
    (
        "helpsteer", [], ("nvidia/HelpSteer3", "preference", None, "train"),
        {"domain": "general", "language": "english", "context": [USER], "response1": "What", "response2": "Hello", "overall_preference": 2},
        pair("helpsteer3/00000", "HelpSteer3", [USER], "Hello", "What", strength=2, domain="general", language="english"),
    ),
    (
        "helpsteer", ["--source", "nvidia/HelpSteer2"], ("nvidia/HelpSteer2", None, "preference", "train"),
        {"split": "train", "prompt": "Hi?\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nHi?", "response_1": "Hello", "response_2": "What", "preference_strength": -1},
        pair("helpsteer2/00000", "HelpSteer2", [USER, ASSISTANT, USER], "Hello", "What", strength=1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "args", "asked", "raw", "golden"), TRAINING, ids=lambda v: v if isinstance(v, str) else ""
)
def test_training_sets_from_the_hub_s_columns(script, hub, name, args, asked, raw, golden):
    calls = hub([raw, raw])  # a repeated row is dropped
    out, said = script(name, *args)
    assert calls == [asked] and out == [golden]
    assert "1 duplicates dropped" in said and "1 rows" in said and "sha256" in said
    again, _ = script(
        name, *[a for a in args if "--source" not in args], rows=out
    )  # what has its form already passes unchanged
    assert again == out


def test_math_from_its_seven_parts(script, hub):
    calls = hub([])
    rows = [{"problem": f"{i}?", "level": level, "type": "Algebra", "solution": f"So \\boxed{{{i}}}."} for i, level in ((4, "Level 5"), (5, "Level ?"))]  # fmt: skip
    rows.append({"problem": "6?", "level": "Level 1", "type": "Algebra", "solution": "\\boxed{}"})
    with pytest.raises(SystemExit, match="no rows"):
        script("math_train")
    assert len(calls) == 7 and calls[0] == ("EleutherAI/hendrycks_math", "algebra", None, "train")
    out, said = script("math_train", rows=rows)
    assert out[0] == record("math/train/00000", "MATH train", "4?", "4", "math_answer", subject="Algebra", level=5, solution="So \\boxed{4}.")  # fmt: skip
    assert [r["answer"] for r in out] == ["4", "5"] and "level" not in out[1]["meta"] and "1 rows left out" in said


def test_every_benchmark_has_a_script_that_asks_the_hub_for_what_its_file_says(script, hub):
    for name in shipped():
        if name.endswith("_logprob") or name == "olymmath_en":
            continue
        spec = load_spec(name)
        calls = hub([])
        with pytest.raises(SystemExit, match="no rows"):
            script(name, *(["--split", "test"] if name in ("gsm8k", "mbpp") else []))
        assert calls == [(s.path, s.name, None, s.split) for s in spec.data], name


def test_a_benchmark_from_a_raw_file(script):
    row = {"unique_id": "test/a.json", "problem": "p", "solution": "s", "answer": "1", "subject": "Algebra", "level": 2}
    out, said = script("math500", rows=[row])
    assert out == [
        record("math500/test/a.json", "MATH-500", "p", "1", "math_answer", subject="Algebra", level=2, solution="s")
    ]
    assert "note: 1 problems, but MATH-500 has 500" in said
    assert script("math500", rows=out)[0] == out
    with pytest.raises(SystemExit, match="1 ids are not unique"):
        script("math500", rows=[row, row])
    with pytest.raises(SystemExit, match=r"row 1: .*is empty"):
        script("math500", rows=[row, {**row, "answer": " "}])


def test_another_hub_data_set(script, hub):
    calls = hub([{"question": "1+1?", "answer": "#### 2"}])
    for args in (["--split", "train"], ["--split", "test"]):
        script("gsm8k", "--source", "me/gsm8k", "--name", "", *args)
    assert calls == [("me/gsm8k", None, None, "train"), ("me/gsm8k", None, None, "test")]


def test_mbpp_keeps_training_and_test_apart(script):
    rows = [{"task_id": n, "prompt": f"{n}", "code": "", "test_imports": [], "test_list": ["assert f()"]} for n in (5, 11, 601)]  # fmt: skip
    assert [r["id"] for r in script("mbpp", rows=rows)[0]] == ["mbpp/601"]
    assert [r["id"] for r in script("mbpp", "--split", "test", rows=rows)[0]] == ["mbpp/11"]


def test_what_can_t_be_used_is_counted_and_too_much_of_it_refused(script):
    good = {"question": "1+1?", "answer": "#### 2"}
    bad = {"question": "q", "answer": "no marker"}
    out, said = script("gsm8k", rows=[good, {**good, "question": "2+0?"}, bad])
    assert len(out) == 2 and "1 rows left out" in said
    with pytest.raises(SystemExit, match="only 1 rows can be used: is this the right file"):
        script("gsm8k", rows=[good, bad, bad])
    with pytest.raises(SystemExit, match="no column 'question'"):
        script("gsm8k", rows=[{"problem": "1+1?", "answer": "#### 2"}])
    with pytest.raises(SystemExit, match="is no file"):
        script("gsm8k", "--source", "raw/none.jsonl")


def test_instructions_that_are_not_known_are_left_out(script):
    def row(n, *ids):
        truth = json.dumps([{"instruction_id": ids, "kwargs": [None] * len(ids)}])
        return {"key": n, "messages": [{"role": "user", "content": f"{n}"}], "ground_truth": truth, "dataset": "ifeval"}

    out, said = script("if_multi_constraints", rows=[row(1, "punctuation:no_comma"), row(2, "copy:copy", "punctuation:no_comma")])  # fmt: skip
    assert [r["id"] for r in out] == ["if-multi/1"] and "1 x instruction copy:copy is not known" in said


def test_hh_keeps_what_differs_in_the_last_answer(script):
    def row(*texts):
        chosen, rejected = (text.replace("H:", "\n\nHuman: ").replace("A:", "\n\nAssistant: ") for text in texts)
        return {"chosen": chosen, "rejected": rejected}

    rows = [
        row("H:HiA:HelloH:Why?A:So.", "H:HiA:HelloH:Why?A: Who knows\n\nor not? "),
        row("H:HiA:HelloH:Why?A:So.", "H:HiA:HuhH:Why?A:No."),  # they part earlier
        row("H:HiA:Hello", "H:HiA:What"),
        row("H:HiA:Hello", "H:HiA: "),
        row("H:HiA:Hello", "H:HiA:Why"),  # another pair for a prompt is no duplicate
    ]
    out, said = script("hh_rlhf", "--split", "test", rows=rows)
    assert "2 rows left out" in said and "1 x the sides part before" in said
    assert [r["id"][-7:] for r in out] == ["t/00000", "t/00002", "t/00004"]
    assert [m["content"] for m in out[0]["prompt"]] == ["Hi", "Hello", "Why?"]
    assert out[0]["rejected"] == [{"role": "assistant", "content": "Who knows\n\nor not?"}]


def test_duplicates_by_what_is_asked(script):
    rows = [
        {"problem": "What is  $X$?", "answer": "1"},
        {"problem": "what is $x$?\n", "answer": "1"},
        {"problem": "What is $X$?", "answer": "2"},
        {"problem": "What is $-X$?", "answer": "1"},
    ]
    out, said = script("deepscaler", rows=rows)
    assert [r["id"] for r in out] == ["deepscaler/0", "deepscaler/3"]
    assert "2 duplicates dropped, 1 of them with another answer" in said


def test_decontamination_by_eight_grams(script, tmp_path):
    long = "one two three four five six seven eight nine ten eleven"
    evaluation = tmp_path / "evals"
    evaluation.mkdir()
    (evaluation / "eval_mine.jsonl").write_text(json.dumps({"id": "e/1", "problem": long}) + "\n" + json.dumps({"id": "e/2", "question": "What is 2+2?"}) + "\n")  # fmt: skip
    (evaluation / "train.jsonl").write_text(json.dumps({"id": "t/1", "problem": "Not this one, it is for training"}) + "\n")  # fmt: skip
    half = long.replace("eleven", "x").replace("ten", "y")  # 2 of 4
    problems = [
        long.upper() + "!",
        half,
        half.replace("nine", "z"),
        "what is $2+2$",
        "Not this one, it is for training",
    ]
    out, said = script("deepscaler", "--decontaminate", evaluation, rows=[{"problem": p, "answer": "1"} for p in problems])  # fmt: skip
    assert [r["id"] for r in out] == ["deepscaler/2", "deepscaler/4"]
    assert "deepscaler/0 is close to e/1 (same words)" in said and "deepscaler/1 is close to e/1 (50% of the 8-grams)" in said  # fmt: skip
    assert "deepscaler/3 is close to e/2 (same words)" in said and "3 rows dropped that are close to one of 2" in said
    with pytest.raises(SystemExit, match="no evaluation set"):
        script("deepscaler", "--decontaminate", tmp_path / "out", rows=[{"problem": "p", "answer": "1"}])


def test_decontamination_finds_what_is_marked_in_real_data(script):
    evaluations = [shared_data(f"eval_{n}.jsonl") for n in ("math500", "olympiadbench")]
    rows = [row for i, row in enumerate(lines(shared_data("train_math.jsonl"))) if row["eval_overlap"] or i % 10 == 0]
    marked = {row["id"] for row in rows if row["eval_overlap"]}
    out, _ = script("math_train", "--decontaminate", *evaluations, rows=rows)
    assert len(marked) == 67 and {row["id"] for row in rows} - {row["id"] for row in out} == marked


def test_mixtures(script, tmp_path):
    for name, count in (("a", 20), ("b", 10), ("c", 3)):
        rows = [record(f"{name}/{i}", name, f"{name}{i}", "1", "exact_match") for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = [f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/b.jsonl:.3", f"{tmp_path}/c.jsonl:0.2"]
    out, said = script("mix", *files, "--size", 11, "--seed", 1)
    sources = [r["source"] for r in out]
    assert (sources.count("a"), sources.count("b"), sources.count("c")) == (6, 3, 2) and sources != sorted(sources)
    assert "exact_match 11" in said
    assert (
        script("mix", *files, "--size", 11, "--seed", 1)[0]
        == out
        != script("mix", *files, "--size", 11, "--seed", 2)[0]
    )
    with pytest.raises(
        SystemExit, match=r"c.jsonl has 3 rows, and 6 are wanted: a smaller --size or weight, or --repeat"
    ):
        script("mix", *files, "--size", 30)
    out, _ = script("mix", *files, "--size", 30, "--repeat")
    assert sorted(r["id"] for r in out if r["source"] == "c") == ["c/0", "c/0~2", "c/1", "c/1~2", "c/2", "c/2~2"]


@pytest.mark.parametrize("kind", MAKERS)
def test_puzzles_have_one_solution_that_the_verifier_knows(script, tmp_path, kind):
    out, said = script(kind, "--count", 24, "--difficulty", "1-4", "--seed", 3)
    assert out == generate(kind, 24, seed=3, difficulties=range(1, 5)) and "24 rows" in said
    assert len({r["messages"][0]["content"] for r in out}) == 24
    assert not {r["id"] for r in out} & {r["id"] for r in generate(kind, 24, seed=4)}
    rows = read_prompts(load_rows([DatasetSource(path=str(tmp_path / "out" / "rows.jsonl"))]))
    prompts = [Prompt(str(i), (1,), row.text, row.columns) for i, row in enumerate(rows)]
    with RewardRunner([RewardSpec(function="verifier", isolate="inline")]) as runner:
        assert runner.check_golds(prompts) == []
        right = [Rollout(p, Completion((1,), (0.0,), "stop", f"Answer: {p.columns['answer']}"), 0) for p in prompts]
        wrong = [Rollout(p, Completion((1,), (0.0,), "stop", f"Answer: {other}"), 0) for p in prompts for other in _others(kind, p)]  # fmt: skip
        assert {row.reward for row in runner.score(right)} == {1.0}
        assert {row.reward for row in runner.score(wrong)} == {
            0.0
        }  # of formulas every other assignment: the solution is unique


def _others(kind, prompt):
    answer = str(prompt.columns["answer"])
    if kind == "arithmetic":
        expression = str(prompt.columns["question"]).removeprefix("Compute ").removesuffix(".")
        assert eval(expression, {"__builtins__": {}}) == int(answer)
        return [str(int(answer) + 1)]
    words = ("true", "false") if kind == "sat" else ("knight", "knave")
    parts = answer.split(", ")
    flipped = []
    for mask in range(1, 2 ** len(parts)):
        changed = [p.replace(*words) if words[0] in p else p.replace(*words[::-1]) for p in parts]
        flipped.append(", ".join(c if mask >> i & 1 else p for i, (p, c) in enumerate(zip(parts, changed))))
    return flipped


def test_knights_and_knaves_are_consistent_in_one_way_only():
    """The statements themselves are read again, by other code than made them."""
    import re
    from itertools import product

    def holds(text, speaker, kinds):
        def k(name):
            return kinds[speaker if name == "I" else name]

        if m := re.fullmatch(r"(\w+) is a (knight|knave)\.", text):
            return k(m[1]) == (m[2] == "knight")
        if m := re.fullmatch(r"(\w+) and (\w+) are of (the same kind|different kinds)\.", text):
            return (k(m[1]) == k(m[2])) == (m[3] == "the same kind")
        if m := re.fullmatch(r"(\w+) is a knave or (\w+) (?:is|am) a knight\.", text):
            return not k(m[1]) or k(m[2])
        if m := re.fullmatch(r"If (\w+) is a knight, then (\w+) (?:is|am) a knave\.", text):
            return not k(m[1]) or not k(m[2])
        m = re.fullmatch(r"(\w+) is a knight and (\w+) (?:is|am) a knave\.", text)
        return k(m[1]) and not k(m[2])

    for row in generate("knights_and_knaves", 60, difficulties=range(1, 6)):
        said = re.findall(r'(\w+) says: "(.*)"', row["messages"][0]["content"])
        names = [name for name, _ in said]
        fitting = []
        for values in product((True, False), repeat=len(names)):
            kinds = dict(zip(names, values))
            if all(holds(text, name, kinds) == kinds[name] for name, text in said):
                fitting.append(", ".join(f"{n} is a {'knight' if v else 'knave'}" for n, v in kinds.items()))
        assert fitting == [row["answer"]]


def test_puzzles_refuse_what_can_t_be_made():
    with pytest.raises(DataError, match="difficulties must be from 1 to 8"):
        generate("sat", 1, difficulties=[9])
    with pytest.raises(DataError, match="no further arithmetic problem of difficulty 1"):
        generate("arithmetic", 1000, difficulties=[1])
    with pytest.raises(DataError, match="no puzzle 'sudoku'"):
        generate("sudoku", 1)


def test_a_script_runs_by_itself(tmp_path):
    """As a user starts it: from anywhere, with its own directory first on the path."""
    command = [sys.executable, str(SCRIPTS / "arithmetic.py"), "--count", "3", "--output", "x/y.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "x" / "y.jsonl")) == 3 and "3 rows (math_answer 3), sha256" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [(["--difficulty", "9"], "from 1 to 8, given"), (["--output", "."], "--output . can't be written")],
)
def test_what_a_script_can_t_do_is_one_line(monkeypatch, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", "--count", "3", "--output", "y.jsonl", *args])
    with pytest.raises(SystemExit, match=says):
        runpy.run_path(str(SCRIPTS / "arithmetic.py"), run_name="__main__")
