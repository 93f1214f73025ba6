"""The house rules that a command can check: sizes, lazy imports, nothing of this machine in the tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "llmrl").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text()
    assert text.count("\n") <= 500, "a file has at most 500 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 80, f"{node.name}() has more than 80 lines"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in out.stdout.split()}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import llmrl", {"torch", "transformers", "vllm", "numpy", "pydantic"}),
        ("import llmrl.types, llmrl.errors", {"torch", "transformers", "numpy"}),
        ("import llmrl.config.load, llmrl.config.grpo", {"torch", "transformers", "numpy"}),
        ("import llmrl.rewards.runner, llmrl.rewards.worker", {"torch", "transformers"}),
        ("import llmrl.cli.main", {"torch", "transformers"}),
    ],
)
def test_imports_stay_light(statement, absent):
    assert not loaded_by(statement) & absent


def test_public_names_resolve():
    import llmrl

    for name in llmrl.__all__:
        assert getattr(llmrl, name) is not None
    with pytest.raises(AttributeError, match="it has"):
        _ = llmrl.NoSuchTrainer
