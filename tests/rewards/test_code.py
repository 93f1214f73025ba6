"""The verifier of code: which code it finds, which tests it reads, and its verdicts on public data sets."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.config.grpo import GRPOConfig
from llmrl.config.reward import RewardSpec
from llmrl.errors import ConfigError, DataError
from llmrl.rewards.base import row_verifier
from llmrl.rewards.code import code_tests, extract_code, programs, read_tests, same_output
from llmrl.rewards.runner import RewardRunner

from .conftest import rollout

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
RIGHT = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0", "assert add(5, 5) == 10"]


def test_the_code_in_a_completion():
    fence = "```"
    for text, code in {
        f"Like so:\n{fence}python\nx = 1\n{fence}\nDone.": "x = 1",
        f"{fence}python\nx = 1\n{fence}\nBetter:\n{fence}py\nx = 2\n{fence}": "x = 2",
        f"{fence}python\nx = 1\n{fence}\nIt prints\n{fence}\n1\n{fence}": "x = 1",
        f"{fence}\nx = 1\n{fence}": "x = 1",
        f"{fence}Python\nx = 1": "x = 1",
        f"  {fence}python\n  x = 1\n  {fence}": "  x = 1",
        f"<think>{fence}python\nx = 1\n{fence}</think>{fence}python\nx = 2\n{fence}": "x = 2",
        f"{fence}sql\nselect 1\n{fence}": "",
        f"{fence}python\n\n{fence}": "",
        "x = 1": "x = 1",
        "": "",
    }.items():
        assert extract_code(text)[0] == code, text
    assert programs("") == programs(" \n") == programs(f"{fence}sql\nselect 1\n{fence}") == []


PROMPT = 'from typing import List\n\ndef total(xs: List[int]) -> int:\n    """ The sum.\n    >>> total([1])\n    1\n    """\n'
CHECK = "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n    assert True\n"


@pytest.mark.parametrize(
    "completion",
    [
        "    return sum(xs)\n",
        "    return sum(xs)\n\n\ndef another(x):\n    retu",
        "    n = 0\n    for x in xs:\n        n += x\n    return n\n\nprint(total([1]))\n# and so on, until\nthe limit",
        "def total(xs: List[int]) -> int:\n    return sum(xs)\n",
        "```python\n    return sum(xs)\n```",
        "Here:\n```python\nfrom typing import List\n\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```\nIt sums.",
        "Here:\n```python\ndef total(xs):\n    return sum(xs)",
    ],
)
def test_a_completion_may_go_on_with_the_prompt(completion):
    assert code_tests.score(completion, PROMPT, test=CHECK, entry_point="total") == 1.0


def test_a_wrong_continuation_fails():
    row = {"test": CHECK, "entry_point": "total"}
    for wrong in ("", "    return 0\n", "    pass", "def other(): pass", "I do not know."):
        assert code_tests.score(wrong, PROMPT, **row) == 0.0, wrong
    # Of the two asserts that say something, `return 0` passes one; it ran to the end.
    assert code_tests.score("    return 0\n", PROMPT, **row, partial=True) == 0.5
    assert code_tests.score("    return sum(xs)", "Write it.", declaration=PROMPT, **row, prefix="declaration") == 1.0


def test_forms_of_tests():
    def score(code, **columns):
        return code_tests.score(f"```python\n{code}\n```", **columns)

    assert (
        score(RIGHT, test_list=TESTS)
        == score(RIGHT, tests="\n".join(TESTS))
        == score(RIGHT, test="\n".join(TESTS))
        == 1.0
    )
    assert score(RIGHT, test_list=["assert math.isclose(add(1, 2), 3)"], test_imports=["import math"]) == 1.0
    calls = {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]]}
    assert score(RIGHT, **calls) == score(RIGHT, input_output=json.dumps(calls)) == 1.0
    assert score("def add(a, b): return (a, b)", fn_name="add", inputs=[[1, 2]], outputs=[[1, 2]]) == 1.0
    assert score("def add(a, b): return True", fn_name="add", inputs=[[1, 0]], outputs=[1]) == 0.0
    method = "class Solution:\n    def add(self, a, b):\n        return a + b"
    assert score(method, fn_name="Solution.add", inputs=[[1, 2]], outputs=[3]) == 1.0
    lines = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3", "7"]}
    assert score("print(sum(map(int, input().split())))", **lines) == 1.0
    assert score("a, b = input().split()\nprint(a + b)", **lines) == 0.0
    assert score(RIGHT) is None and score(RIGHT, answer="3") is None


def test_partial_credit_is_the_share_of_tests():
    half = "```python\ndef add(a, b):\n    return a + b if a >= 0 and b < 5 else None\n```"
    assert code_tests.score(half, tests=TESTS, partial=True) == 0.5
    assert code_tests.score(half, tests=TESTS) == 0.0
    assert code_tests.score("nothing here", tests=TESTS, partial=True) == 0.0
    late = "def add(a, b):\n    while a < 0: pass\n    return a + b"
    seen = {}
    score = code_tests.score(late, None, seen.__setitem__, tests=TESTS, partial=True, test_seconds=0.5)
    assert score == 0.5 and seen == {"code_status": "timeout"}
    assert score.note.startswith("2 of 4 tests passed; ") and score.note.endswith(": out of time")


def test_why_is_told():
    for completion, status, note in (
        (RIGHT, "passed", ""),
        ("```python\n```", "no code", "no code"),
        ("def add(a, b): return 1 / 0", "failed", "ZeroDivisionError: division by zero"),
        ("def add(a, b):", "failed", "IndentationError"),
        ("def plus(a, b): return a + b", "failed", "AttributeError: module 'candidate' has no attribute 'add'"),
    ):
        seen: dict[str, object] = {}
        score = code_tests.score(completion, None, seen.__setitem__, tests=TESTS)
        assert seen["code_status"] == status and note in getattr(score, "note", ""), (completion, seen)
        assert status != "failed" or score.note.startswith(f"0 of 4 tests passed; {TESTS[0]}: ")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "no tests"),
        ({"tests": []}, "no tests"),
        ({"tests": ["x = 1"]}, "assert nothing"),
        ({"tests": ["assert f("]}, "no Python"),
        ({"test": "def test(candidate): pass", "entry_point": "f"}, "no function check"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [1], "outputs": [1], "fn_name": "f"}, "lists of its arguments"),
        ({"input_output": "{"}, "can't be read"),
        ({"tests": ["import numpy\nassert f() == numpy.pi"]}, "imports 'numpy'"),
    ],
)
def test_rows_without_usable_tests_are_named(columns, says):
    with pytest.raises(DataError, match=says):
        read_tests(columns)
    assert says in code_tests.check_gold(**columns)


def test_outputs_are_compared_up_to_white_space():
    assert same_output("1  2 \r\n\n3\n\n", "1 2\n3") and same_output("", "\n")
    assert not same_output("1 2 3", "1 2\n3") and not same_output("12", "1 2")


def test_it_runs_only_where_the_recipe_allows_it(tmp_path):
    spec = RewardSpec(function="code_tests")
    with pytest.raises(ConfigError, match="allow_code_execution: true"):
        RewardRunner([spec])
    with pytest.raises(ConfigError, match="allow_code_execution"):
        RewardRunner([], reward_funcs=[code_tests])
    own = tmp_path / "own.py"
    own.write_text("from llmrl.rewards.code import code_tests\n")
    with pytest.raises(ConfigError, match="allow_code_execution"):
        RewardRunner([RewardSpec(function=f"{own}:code_tests")])
    assert GRPOConfig(model_name_or_path="m", output_dir="o").allow_code_execution is False
    assert row_verifier(lambda completion: 1.0).runs_code is False
    with pytest.raises(ConfigError, match="test_seconds must be"):
        RewardRunner([RewardSpec(function="code_tests", args={"test_seconds": 0})], allow_code_execution=True)


def test_through_the_runner():
    hang = "def add(a, b):\n    while True: pass"
    rows = [
        rollout(text, n, tests=TESTS)
        for n, text in enumerate([RIGHT, hang, "no", "import os; os.kill(os.getppid(), 9)"])
    ]
    rows.append(rollout(RIGHT, 9, tests=None))
    spec = RewardSpec(function="code_tests", args={"test_seconds": 0.5})
    with RewardRunner([spec], allow_code_execution=True) as runner:
        scored = runner.score(rows)
        (bad,) = runner.check_golds([r.prompt for r in rows])
    assert [s.parts["code_tests"] for s in scored] == [1.0, 0.0, 0.0, 0.0, None]
    assert [s.extra["code_status"] for s in scored] == ["passed", "timeout", "failed", "failed", None]
    assert bad.prompt_id == "p9"


# --- public data


def tasks(every: int = 1) -> list[dict]:
    files = [DATA / "code_mbpp_sanitized.jsonl", DATA / "code_humaneval.jsonl"]
    if not all(f.exists() for f in files):
        pytest.skip("MBPP and HumanEval are not here")
    return [json.loads(line) for f in files for line in f.read_text().splitlines()][::every]


def verdict(row: dict, completion: str, **more) -> float | None:
    prompt = row["prompt"] if "entry_point" in row else None
    return code_tests.score(completion, prompt, **{k: v for k, v in row.items() if k != "prompt"}, **more)


def solution(row: dict) -> str:
    """The whole program."""
    return (row["prompt"] if "entry_point" in row else "") + row["canonical_solution"]


def names(row: dict) -> list[str]:
    """The functions under test."""
    defined = [n.name for n in ast.parse(solution(row)).body if isinstance(n, ast.FunctionDef)]
    return (
        [row["entry_point"]]
        if "entry_point" in row
        else [n for n in defined if any(f"{n}(" in t for t in row["tests"])]
    )


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_reference_solutions_pass(every):
    failed = [row["id"] for row in tasks(every) if verdict(row, row["canonical_solution"]) != 1.0]
    failed += [row["id"] for row in tasks(10 * every) if verdict(row, f"So:\n```python\n{solution(row)}\n```") != 1.0]
    assert failed == []


WRONG = {
    "empty": "def {f}(*a, **k):\n    pass",
    "raising": "def {f}(*a, **k):\n    raise ValueError('no')",
    "off by one": """
_right = {f}
def _off(v):
    if isinstance(v, bool): return not v
    if isinstance(v, (int, float, complex)): return v + 1
    if isinstance(v, str): return v + 'x'
    if isinstance(v, dict): return {{**v, 'x': 1}}
    if isinstance(v, set): return v ^ {{'x'}}
    if isinstance(v, (list, tuple)): return type(v)([*v, 0])
    return 'x'
def {f}(*a, **k):
    return _off(_right(*a, **k))
""",
    "equal to everything": "class _E:\n    __eq__ = __lt__ = __gt__ = lambda s, o: True\ndef {f}(*a, **k):\n    return _E()",
    "exiting": "import os\ndef {f}(*a, **k):\n    os._exit(0)",
}


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_planted_wrong_ones_fail(every):
    passed = []
    for number, row in enumerate(tasks(every)):
        kind = list(WRONG)[number % len(WRONG)]
        if row["id"] == "mbpp/123" and kind == "off by one":
            continue  # ten seconds for nothing new
        code = "\n".join([solution(row), *(WRONG[kind].format(f=f) for f in names(row))])
        if verdict(row, f"```python\n{code}\n```") != 0.0:
            passed.append((row["id"], kind))
    assert passed == []


class _OtherConstant(ast.NodeTransformer):
    """Adds one to the last number of a program."""

    def __init__(self, tree: ast.Module) -> None:
        numbers = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is int]
        self.target = numbers[-1] if numbers else None

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant(node.value + 1) if node is self.target else node


@pytest.mark.slow
def test_verdicts_are_those_of_plain_python():
    """Mutants of reference solutions: the verdict is that of running the same asserts in one ordinary interpreter."""
    seen = {0.0: 0, 1.0: 0}
    for row in tasks(15):
        tree = ast.parse(solution(row))
        code = ast.unparse(_OtherConstant(tree).visit(tree))
        ending = (
            f"{row['test']}\ncheck({row['entry_point']})"
            if "entry_point" in row
            else "\n".join([*row["test_imports"], *row["tests"]])
        )
        plain = subprocess.run(
            ["timeout", "-s", "KILL", "8", sys.executable, "-I", "-c", f"{code}\n{ending}"], capture_output=True
        )
        got = verdict(row, f"```python\n{code}\n```")
        assert got == float(plain.returncode == 0), row["id"]
        seen[got] += 1
    assert min(seen.values()) > 5


@pytest.mark.parametrize("name", ["mbpp-scratch-grpo", "qwen2.5-coder-1.5b-mbpp-grpo"])
def test_the_recipes_train_two_steps_of_a_small_model(name, tiny_model_dir, tmp_path):
    from llmrl.algorithms.grpo import GRPOTrainer
    from llmrl.config.load import load_recipe

    row = {"question": "Add.", "text": "Add.", "tests": TESTS, "test_list": TESTS, "test_imports": []}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "id": f"r{n}"}) + "\n" for n in range(4)))
    small = {
        "model_name_or_path": str(tiny_model_dir), "output_dir": str(tmp_path / "run"), "max_steps": 2, "batch_size": 2,
        "num_generations": 2, "max_completion_length": 8, "reward_workers": 1, "dataset.0.path": str(path),
    }  # fmt: skip
    quick = {
        "mixed_precision": "no",
        "gradient_checkpointing": "false",
        "max_prompt_length": 400,
        "dataset.0.name": "null",
    }
    config = load_recipe("grpo", name, [f"{k}={v}" for k, v in {**small, **quick}.items()])
    GRPOTrainer(config).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["code/tests_passed"] == 0.0 for line in lines)
    assert all(line["reward_outcomes/code_tests/score"] == 4 for line in lines)
