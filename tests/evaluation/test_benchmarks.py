"""Benchmarks: what their files say, the published sets in their raw columns and in local copies, worked solutions, and bad input."""

from __future__ import annotations

import functools
import json
from fractions import Fraction

import pytest

from llmrl.config.benchmark import BenchmarkSpec
from llmrl.data.convert import CONVERTERS, FIELDS, checked, read
from llmrl.data.sources import Row
from llmrl.errors import ConfigError, DataError
from llmrl.evaluation.benchmarks import asked, find_spec, find_template, load_benchmark, load_spec, shipped
from llmrl.rewards.load import import_target
from tests.conftest import SHARED_DATA, shared_data

COUNTS = {
    "math500": 500, "aime24": 30, "aime25": 30, "amc23": 40, "minerva_math": 272, "olympiadbench": 675, "olymmath_en": 200,
    "gsm8k": 1319, "arc_easy": 2376, "arc_challenge": 1172, "arc_easy_logprob": 2376, "arc_challenge_logprob": 1172, "ifeval": 541,
    "humaneval": 164, "mbpp": 257,
}  # fmt: skip
MATH = ["math500", "aime24", "aime25", "amc23", "minerva_math", "olympiadbench", "olymmath_en", "gsm8k"]


@functools.cache
def local(name: str):
    files = {"humaneval": "code_humaneval", "mbpp": "code_mbpp_sanitized"}
    shared_data(f"{files.get(name, 'eval_' + name.removesuffix('_logprob'))}.jsonl")
    return load_benchmark(name, SHARED_DATA)


def verdict(benchmark, problem, completion):
    """By the benchmark's scorer, in this process."""
    scorer = benchmark.spec.scorer
    columns = {**problem["meta"], "answer": problem["answer"], **scorer.args}
    return import_target(scorer.function)(completions=[completion], **{k: [v] if k not in scorer.args else v for k, v in columns.items()})[0]  # fmt: skip


# --- what is shipped


def test_every_benchmark_is_counted_here():
    assert shipped() == sorted(COUNTS)
    for name in shipped():
        assert load_spec(name).problems[-1] == COUNTS[name]


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_local_copies_load_with_the_documented_count(name):
    benchmark = local(name)
    assert len(benchmark.problems) == COUNTS[name]
    for problem in benchmark.problems:
        assert set(FIELDS) <= set(problem) and checked(problem) == problem
    for template in benchmark.spec.prompts:
        rows = asked(benchmark, template)
        assert len({row.values["id"] for row in rows}) == COUNTS[name]
        for row, problem in zip(rows[:: len(rows) // 10], benchmark.problems[:: len(rows) // 10], strict=True):
            prompt = row.values["prompt"]
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            assert problem["messages"][-1]["content"] in text
            assert all(choice["text"] in text for choice in problem["meta"].get("choices", ())) or "logprob" in name
            assert isinstance(prompt, str) is (find_template(benchmark, template).text is not None)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("MATH-500", "math500"), ("math_500", "math500"), ("AIME2024", "aime24"), ("aime-25", "aime25"), ("AMC 23", "amc23"),
        ("minerva", "minerva_math"), ("OlympiadBench", "olympiadbench"), ("ARC-Challenge", "arc_challenge"), ("arc-e", "arc_easy"),
        ("IFEval", "ifeval"), ("HumanEval", "humaneval"), ("MBPP", "mbpp"), ("GSM8K", "gsm8k"),
    ],
)  # fmt: skip
def test_names_as_users_type_them(typed, name):
    assert find_spec(typed).stem == name


@pytest.mark.parametrize(
    ("typed", "says"),
    [("mth500", "did you mean math500"), ("arc", "arc_easy"), ("xyzzy", "the path of a YAML file"), ("no/such.yaml", "no such file")],
)  # fmt: skip
def test_unknown_names(typed, says):
    with pytest.raises(ConfigError, match=says):
        load_benchmark(typed)


# --- raw columns of the hub's sets, and of their copies

ARC_HUB = {
    "id": "M_1",
    "question": "Which?",
    "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]},
    "answerKey": "3",
}
OLYMPIAD = {
    "id": 7, "question": "q", "context": None, "final_answer": ["$8$,$4$"], "is_multiple_answer": True, "unit": None, "error": None,
    "answer_type": "Numerical", "subfield": "Algebra", "solution": ["s"],
}  # fmt: skip
RAW = [
    ("math500", {"problem": "p", "solution": "s", "answer": "3", "subject": "Algebra", "level": 2, "unique_id": "test/a/1.json"}, "math500/test/a/1.json", "3"),
    ("aime24", {"id": 60, "problem": "p", "solution": "s", "answer": "073", "url": "u", "year": "2024"}, "aime24/60", "73"),
    ("aime24", {"ID": "2024-II-4", "Problem": "p", "Solution": "s", "Answer": 33}, "aime24/2024-II-4", "33"),
    ("aime24", {"id": 60, "problem": "p", "solution": r"so \boxed{204}.", "url": "u"}, "aime24/60", "204"),
    ("aime25", {"question": "p", "answer": "070"}, "aime25/5", "70"),
    ("amc23", {"id": 0, "question": "p", "answer": "27.0", "url": "u"}, "amc23/0", "27"),
    ("amc23", {"id": 0, "question": "p", "answer": 27.0, "url": "u"}, "amc23/0", "27"),
    ("minerva", {"problem": "p", "solution": r"\boxed{2} \[ =\boxed{1.6} \mathrm{~cm}\]", "type": "Astronomy", "idx": 3}, "minerva/3", "1.6"),
    ("minerva", {"question": "p", "answer": "4.5e33"}, "minerva/5", "4.5e33"),
    ("minerva", {"question": "p", "answer": "np.arcsin(10/13)"}, "minerva/5", r"\arcsin(10/13)"),
    ("olympiadbench", OLYMPIAD, "olympiadbench/7", "8,4"),
    ("olympiadbench", {**OLYMPIAD, "is_multiple_answer": False, "final_answer": ["45"], "unit": "minute"}, "olympiadbench/7", r"45\text{ minute}"),
    ("olympiadbench", {**OLYMPIAD, "is_multiple_answer": False, "final_answer": ["166"], "unit": "$cm^2$"}, "olympiadbench/7", r"166\text{ cm}^2"),
    ("olympiadbench", {**OLYMPIAD, "is_multiple_answer": False, "final_answer": ["4.2"], "unit": "%", "error": "1e-1"}, "olympiadbench/7", "4.2"),
    ("olymmath", {"problem": "p", "answer": "$x$", "subject": "Algebra", "unique_id": "OlymMATH-HARD-1-EN"}, "OlymMATH-HARD-1-EN", "$x$"),
    ("gsm8k", {"question": "p", "answer": "a <<1+1=2>>\n#### 1,002"}, "gsm8k/test/00005", "1002"),
    ("arc", ARC_HUB, "M_1", "C"),
    ("ifeval", {"key": 1000, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}, "ifeval/1000", ""),
    ("humaneval", {"task_id": "HumanEval/0", "prompt": "p", "canonical_solution": "c", "test": "t", "entry_point": "f"}, "HumanEval/0", ""),
    ("mbpp", {"task_id": 11, "prompt": "p", "code": "c", "test_imports": [], "test_list": ["assert f()"]}, "mbpp/11", ""),
    ("problem", {"prompt": "p", "solution": r"\boxed{3}", "topic": "t"}, "5", "3"),
]  # fmt: skip


@pytest.mark.parametrize(("convert", "row", "id", "answer"), RAW, ids=lambda v: v if isinstance(v, str) else "")
def test_raw_columns(convert, row, id, answer):
    found = read(row, 5, CONVERTERS[convert])
    assert (found["id"], found["answer"]) == (id, answer)
    assert read(found, 0, CONVERTERS[convert]) == found  # what has the form already passes
    assert read(json.loads(json.dumps(found)), 0, CONVERTERS["mbpp"]) == found


def test_sources_that_are_asked_for(monkeypatch):
    asked_for = []

    def hub(source):
        asked_for.append((source.path, source.name, source.split))
        hard = source.name == "en-hard"
        row = {"problem": "p", "answer": "2", "subject": "Algebra"}
        return [
            Row({**row, "unique_id": f"OlymMATH-{'HARD' if hard else 'EASY'}-{i}-EN"}, f"hub:{i}") for i in range(100)
        ]

    monkeypatch.setattr("llmrl.data.sources._read_hub", hub)
    problems = load_benchmark("olymmath_en").problems
    assert asked_for == [("RUC-AIBOX/OlymMATH", "en-easy", "test"), ("RUC-AIBOX/OlymMATH", "en-hard", "test")]
    assert [problems[i]["meta"]["difficulty"] for i in (0, 99, 100, 199)] == ["easy", "easy", "hard", "hard"]


def test_what_converters_keep():
    arc = read(ARC_HUB, 0, CONVERTERS["arc"])
    assert arc["meta"]["choices"] == [{"label": label, "text": text} for label, text in zip("ABC", "wxy", strict=True)]
    assert read({**OLYMPIAD, "error": "1e-1"}, 0, CONVERTERS["olympiadbench"])["meta"]["error"] == 0.1
    asks = read({**OLYMPIAD, "context": "Given."}, 0, CONVERTERS["olympiadbench"])
    assert asks["messages"][-1]["content"] == "Given.\nq"
    ifeval = read(RAW[-4][1], 0, CONVERTERS["ifeval"])
    assert ifeval["meta"] == {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "instructions": 1}
    assert (
        read({"task_id": 3, "prompt": "p", "test_list": ["assert f()"]}, 0, CONVERTERS["mbpp"]) is None
    )  # not of the test split
    assert read({"question": "p", "answer": "4", "topic": "t", "level": None}, 0, CONVERTERS["problem"])["meta"] == {
        "topic": "t"
    }


@pytest.mark.parametrize(
    ("convert", "row", "says"),
    [
        ("math500", {"question": "p", "answer": "3"}, "no column 'problem'; the row has: question, answer"),
        ("math500", {"problem": "p", "answer": " "}, "the column 'answer' is empty"),
        ("math500", {"problem": "p", "answer": None}, "no column 'answer'"),
        ("math500", {"problem": "", "answer": "3"}, "'problem' is empty"),
        ("aime24", {"problem": "p", "answer": "x+1"}, "not a whole number"),
        ("aime24", {"problem": "p", "answer": "2.5"}, "not a whole number"),
        ("aime24", {"problem": "p", "answer": "inf"}, "not a whole number"),
        ("minerva", {"problem": "p", "solution": "no box"}, r"no \\boxed{} in the solution"),
        ("olympiadbench", {**OLYMPIAD, "final_answer": []}, "final_answer is empty"),
        ("olympiadbench", {**OLYMPIAD, "error": "small"}, "'small' is no number"),
        ("arc", {**ARC_HUB, "answerKey": "D"}, "the key 'D' is not one of the choices' labels, 1, 2, 3"),
        ("mbpp", {"task_id": 12, "prompt": "p", "test_list": []}, "no tests"),
        ("mbpp", {"task_id": "x", "prompt": "p", "test_list": ["assert f()"]}, "is no number"),
        ("problem", {"answer": "3"}, "no column 'problem or question or prompt'"),
        ("problem", {"messages": [{"role": "assistant", "content": "a"}], "answer": "3"}, "ends with the user's"),
        ("problem", {"id": " ", "question": "p", "answer": "3"}, "the id is empty"),
    ],
)  # fmt: skip
def test_rows_that_can_not_be_used(convert, row, says):
    with pytest.raises(DataError, match=says):
        read(row, 0, CONVERTERS[convert])


# --- right answers score, others don't


@functools.cache
def published():
    """OlympiadBench's answers as they stand in its file, with `$` and units apart."""
    rows = [json.loads(line) for line in shared_data("eval_olympiadbench.jsonl").read_text().splitlines()]
    return {row["id"]: row["answer_raw"][0] + (row["unit"] or "") for row in rows}


def worked(benchmark, problem):
    """The worked solution, with the answer as it was published where the solution does not mark it."""
    solution, answer = problem["meta"].get("solution", "It is so."), problem["answer"]
    if benchmark.name == "gsm8k":
        return f"{solution}\n#### {answer}"
    if r"\boxed" in solution:
        return solution
    if benchmark.name == "olympiadbench":
        return f"{solution}\nThe final answer is \\boxed{{{published()[problem['id']]}}}."
    return f"{solution}\nThe final answer is $\\boxed{{{answer}}}$."


def wrong_of(name, every):
    benchmark = local(name)
    return [p["id"] for p in benchmark.problems[::every] if verdict(benchmark, p, worked(benchmark, p)) != 1.0]


def permuted_right(name, every):
    """(answer, the next problem's answer) where that one was taken for right."""
    benchmark = local(name)
    problems = benchmark.problems[::every]
    pairs = zip(problems, [*problems[1:], problems[0]], strict=True)
    return [
        (p["answer"], q["answer"]) for p, q in pairs if verdict(benchmark, p, rf"Thus \boxed{{{q['answer']}}}.") != 0.0
    ]


def value(answer):
    return Fraction(answer.rpartition("=")[2].replace("$", ""))


SAMPLED = {"math500": 17, "gsm8k": 61, "minerva_math": 13, "olympiadbench": 29, "olymmath_en": 11}


@pytest.mark.parametrize("name", MATH)
def test_worked_solutions_score(name):
    assert wrong_of(name, SAMPLED.get(name, 1)) == []
    assert all(value(a) == value(b) for a, b in permuted_right(name, SAMPLED.get(name, 1)))


@pytest.mark.slow
def test_all_worked_solutions_score():
    # minerva/5: np.arcsin(10/13), read as a formula in the reference; 1965: "$f(x)=a x+b$, where $b$ is an arbitrary integer, and $a$ ...", a sentence with formulas in it.
    assert {name: wrong for name in MATH if (wrong := wrong_of(name, 1))} == {
        "minerva_math": ["minerva/5"], "olympiadbench": ["olympiadbench/1965"],
    }  # fmt: skip
    found = {name: permuted_right(name, 1) for name in MATH}
    assert all(value(a) == value(b) for pairs in found.values() for a, b in pairs)
    assert {name: len(pairs) for name, pairs in found.items() if pairs} == {
        "math500": 3, "gsm8k": 15, "amc23": 3, "olympiadbench": 4,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_letters_score(name):
    benchmark = local(name)
    forms = [
        "Answer: {a}",
        "So.\n\nThe best answer is {a}",
        " {a}",
        r"\boxed{{{a}}}",
        "**Answer: {a}. {t}**",
        "Answer: ({a})",
    ]
    assert {len(p["meta"]["choices"]) for p in benchmark.problems} == {3, 4, 5}
    for problem in benchmark.problems[::20]:
        gold, choices = problem["answer"], problem["meta"]["choices"]
        text = next(c["text"] for c in choices if c["label"] == gold)
        other = "A" if gold != "A" else "B"
        assert [f for f in forms if verdict(benchmark, problem, f.format(a=gold, t=text)) != 1.0] == []
        assert verdict(benchmark, problem, f"Answer: {other}") == 0.0


def test_reference_programs_score():
    for name, every in (("humaneval", 50), ("mbpp", 90)):
        benchmark = local(name)
        for problem in benchmark.problems[::every]:
            code = problem["meta"]["canonical_solution"]
            whole = f"Sure:\n```python\n{problem['meta'].get('code_prompt', '')}{code}\n```\nDone."
            assert verdict(benchmark, problem, whole) == 1.0
            assert verdict(benchmark, problem, code) == 1.0  # a base model goes on with the prompt
            assert verdict(benchmark, problem, "    return None\n") == 0.0


@pytest.mark.parametrize(
    ("name", "meta", "answer", "right", "wrong"),
    [
        ("aime24", {}, "73", ["073", "73", "73.0"], ["74", "730"]),
        ("minerva_math", {}, "4.5e33", [r"4.5 \times 10^{33} \mathrm{~erg}", "4.50001e33"], ["4.6e33", "4.502e33"]),
        ("minerva_math", {}, r"\arcsin{10/13}", ["0.87771", r"\arcsin(\frac{10}{13})"], ["0.878", "10/13"]),
        ("minerva_math", {}, "I(0)", ["I(0)"], ["y'+ry-rx(t)=0", "0.5", "0"]),
        ("olympiadbench", {}, "8,4", ["4, 8", r"4 \text{ and } 8", "x=8 or x=4"], ["8", "8, 4, 2", "8, 5"]),
        ("olympiadbench", {}, r"45\text{ minute}", ["45", r"45 \text{ min}", r"\frac{3}{4} \text{ hours}"], [r"45\text{ s}", "44"]),
        ("olympiadbench", {"error": 0.1}, "4.2", ["4.3", "4.12", r"4.25\%"], ["4.31", "4.0"]),
        ("olympiadbench", {"error": None}, "4.2", ["4.2"], ["4.3"]),
        ("olympiadbench", {}, "(1,8,19),(2,7,13)", ["(2,7,13), (1,8,19)"], ["(1,8,19)", "(8,1,19),(2,7,13)"]),
    ],
)  # fmt: skip
def test_traps(name, meta, answer, right, wrong):
    class Shipped:
        spec = load_spec(name)

    problem = {"meta": {k: v for k, v in meta.items() if v is not None}, "answer": answer}
    assert [r for r in right if verdict(Shipped, problem, rf"So \boxed{{{r}}}.") != 1.0] == []
    assert [w for w in wrong if verdict(Shipped, problem, rf"So \boxed{{{w}}}.") != 0.0] == []


# --- own files, and what is wrong with them

OWN = "title: Mine\ndata: rows.jsonl\nprompts: [boxed, plain]\n"
ROW = {"id": "a", "question": "1+1 with {choices} and \\frac{1}{2}", "answer": "2"}


def own(tmp_path, rows, text=OWN):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(text)
    return str(tmp_path / "mine.yaml")


def test_an_own_benchmark(tmp_path):
    text = OWN.replace("[boxed, plain]", "{short: {user: '{question} Briefly.', system: Hi}, base: plain}")
    benchmark = load_benchmark(own(tmp_path, [ROW, {**ROW, "id": "b", "topic": "x"}], text))
    assert (benchmark.name, len(benchmark.problems), list(benchmark.spec.prompts)) == ("mine", 2, ["short", "base"])
    row = asked(benchmark)[1].values
    assert row["prompt"] == [
        {"role": "system", "content": "Hi"},
        {"role": "user", "content": f"{ROW['question']} Briefly."},
    ]
    assert (row["answer"], row["topic"], row["verifier"]) == ("2", "x", "math_answer")
    assert asked(benchmark, "base")[0].values["prompt"].startswith(f"Question:\n{ROW['question']}\nAnswer:")
    with pytest.raises(ConfigError, match="no template 'chat'; it has: short, base"):
        asked(benchmark, "chat")


def test_conversations_keep_their_earlier_turns(tmp_path):
    turns = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes?"), ("user", "1+1"))]
    benchmark = load_benchmark(own(tmp_path, [{"messages": turns, "answer": "2"}]))
    assert [m["content"].split("\n")[0] for m in asked(benchmark)[0].values["prompt"]] == ["Hi", "Yes?", "1+1"]
    with pytest.raises(DataError, match="several turns"):
        asked(benchmark, "plain")


@pytest.mark.parametrize(
    ("rows", "text", "error", "says"),
    [
        ([ROW, ROW], OWN, DataError, "1 ids stand more than once .a."),
        ([{**ROW, "answer": ""}], OWN, DataError, r"rows.jsonl:1: the column 'answer' is empty"),
        ([{"id": "a", "text": "q"}], OWN, DataError, "rows.jsonl:1: no column"),
        ([ROW], OWN + "problems: 2\n", DataError, "1 problems, but mine has 2; .* not be comparable"),
        ([ROW], OWN + "convert: mth500\n", ConfigError, "'mth500' is not known; there are: math500"),
        ([ROW], OWN.replace("boxed", "boxd"), ConfigError, "no template is called 'boxd'; there are boxed"),
        ([ROW], OWN.replace("[boxed, plain]", "{a: {user: hello}}"), ConfigError, "has no {question}"),
        ([ROW], OWN.replace("[boxed, plain]", "{}"), ConfigError, "at least one template"),
        ([ROW], OWN + "mode: choices\n", ConfigError, "templates have `text`"),
        ([ROW], OWN + "n: 4\n", ConfigError, "4 equal completions"),
        ([ROW], OWN + "scrorer: math_answer\n", ConfigError, "scorer"),
        ([ROW], OWN.replace("rows.jsonl", "rovs.jsonl"), DataError, "rovs.jsonl does not exist"),
    ],
)  # fmt: skip
def test_bad_own_files(tmp_path, rows, text, error, says):
    with pytest.raises(error, match=says):
        load_benchmark(own(tmp_path, rows, text))


def test_bad_local_copies(tmp_path):
    with pytest.raises(ConfigError, match=r"no copy of math500 \(looked for math500.jsonl,.*eval_math500.jsonl"):
        load_benchmark("math500", tmp_path)
    with pytest.raises(ConfigError, match="is no directory"):
        load_benchmark("math500", tmp_path / "none")
    (tmp_path / "aime24.jsonl").write_text(json.dumps({"id": 1, "problem": "p", "answer": "3"}) + "\n")
    with pytest.raises(DataError, match="1 problems, but aime24 has 30"):
        load_benchmark("aime24", tmp_path)
    (tmp_path / "aime24.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        load_benchmark("aime24", tmp_path)


def test_a_list_of_problem_numbers_is_any_of_them():
    given = {"title": "t", "data": "x.jsonl", "prompts": "boxed", "problems": [674, 675]}
    assert BenchmarkSpec(**given).problems == [674, 675] and BenchmarkSpec(**{**given, "problems": 3}).problems == [3]
