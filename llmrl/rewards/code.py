"""The verifier of code: runs the Python in a completion against the row's tests, in the sandbox (docs/code.md says what that is)."""

from __future__ import annotations

import ast
import functools
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmrl.errors import DataError, RewardError
from llmrl.rewards.base import Noted, completion_text, row_verifier
from llmrl.rewards.sandbox import Limits, Report, Sandbox

PYTHON_TAGS = ("python", "py", "python3", "python3.11")
REFERENCE_COLUMNS = ("canonical_solution", "code", "reference_solution", "solution")
ROW_SECONDS = 60.0  # by the clock, of a row: more than the limits allow by default
MAX_CODE_CHARACTERS = 200_000


@dataclass(frozen=True)
class Tests:
    """kind "asserts", "check" or "calls": `payload` is what `sandbox_guest.checker` takes. kind "program": `inputs` and `outputs`."""

    kind: str
    count: int
    entry: str | None = None
    payload: Mapping[str, Any] | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def read_tests(columns: Mapping[str, Any], prefix: str = "") -> Tests:
    """The tests of a row. prefix: the code that the completion goes on with. Raises DataError where there are none that can be used.

    In this order: `input_output` (an object, or JSON of one) or the columns `inputs`, `outputs`, `fn_name`; `test` with `entry_point`
    (HumanEval); `test_list`, `tests` or `test` (a list of asserts, or one text), after `test_imports` and `test_setup_code` (MBPP).
    """
    given = columns.get("input_output")
    if given is None and columns.get("outputs") is not None:
        given = {name: columns.get(name) for name in ("inputs", "outputs", "fn_name")}
    if given is not None:
        return _io_tests(given)
    test, entry = columns.get("test"), columns.get("entry_point")
    if isinstance(test, str) and entry:
        functions = {n.name for n in _parsed(test, "test").body if isinstance(n, ast.FunctionDef)}
        if "check" not in functions:
            raise DataError(
                "`test` defines no function check(candidate), as it must where the row has an `entry_point`"
            )
        return Tests("check", 1, str(entry), {"kind": "check", "setup": prefix, "test": test, "entry": str(entry)})
    listed = next((columns[n] for n in ("test_list", "tests", "test") if columns.get(n)), None)
    if listed is None:
        raise DataError(
            "the row has no tests: none of the columns test_list, tests, test (with entry_point), inputs and outputs, or input_output"
        )
    setup = "\n".join([*(columns.get("test_imports") or []), columns.get("test_setup_code") or ""])
    asserts = []
    for text in [listed] if isinstance(listed, str) else listed:
        for line in _parsed(text, "a test").body:
            if isinstance(line, ast.Assert):
                asserts.append(ast.unparse(line))
            else:  # what a test needs before its asserts
                setup += "\n" + ast.unparse(line)
    if not asserts:
        raise DataError("the row's tests assert nothing")
    _parsed(setup, "what comes before the tests")
    own = sorted(_reference_names(columns))
    return Tests("asserts", len(asserts), None, {"kind": "asserts", "setup": setup, "tests": asserts, "own": own})


def _reference_names(columns: Mapping[str, Any]) -> set[str]:
    """What the row's reference solution defines: the names of its own, should they be those of built-in functions (MBPP has a `sum`).

    The code under test does not get to say so: it could put a `set` of its own into the comparison.
    """
    for name in REFERENCE_COLUMNS:
        if isinstance(columns.get(name), str):
            try:
                body = ast.parse(columns[name]).body
            except (SyntaxError, ValueError, RecursionError):
                continue
            return {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return set()


def _io_tests(given: Any) -> Tests:
    try:
        data = json.loads(given) if isinstance(given, str) else dict(given)
        inputs, outputs, name = list(data["inputs"]), list(data["outputs"]), data.get("fn_name")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"inputs and outputs can't be read: {type(error).__name__}: {error}") from None
    if len(inputs) != len(outputs) or not inputs:
        raise DataError(f"{len(inputs)} inputs and {len(outputs)} outputs; one of each a test is needed")
    if name:
        if not all(isinstance(arguments, list) for arguments in inputs):
            raise DataError(f"the inputs of tests of {name!r} must be lists of its arguments")
        tests = [list(pair) for pair in zip(inputs, outputs, strict=True)]
        return Tests("calls", len(tests), str(name), {"kind": "calls", "entry": str(name), "tests": tests})
    as_text = [tuple("\n".join(map(str, v)) if isinstance(v, list) else str(v) for v in c) for c in (inputs, outputs)]
    return Tests("program", len(inputs), None, None, as_text[0], as_text[1])


def _parsed(text: str, what: str) -> ast.Module:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{what} is no Python: {error}") from None
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        for name in names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if name.partition(".")[0] not in sys.stdlib_module_names:
                raise DataError(f"{what} imports {name!r}, and the sandbox has the standard library only")
    return tree


def extract_code(completion: str) -> tuple[str, bool]:
    """The code in a completion, and whether it was in a fence.

    The last fenced block that is marked as Python, else the last that is not marked; also one that is not closed; else the whole text.
    What comes before `</think>` does not count.
    """
    text = completion.rpartition("</think>")[2]
    blocks: list[tuple[str, str]] = []
    tag: str | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        mark = line.strip()
        if mark.startswith("```"):
            if tag is None:
                tag, lines = mark.strip("`").strip().lower(), []
                continue
            blocks.append((tag, "\n".join(lines)))
            tag = None
        elif tag is not None:
            lines.append(line)
    if tag is not None:
        blocks.append((tag, "\n".join(lines)))
    for tags in (PYTHON_TAGS, ("",)):
        found = [code for tag, code in blocks if tag in tags and code.strip()]
        if found:
            return found[-1], True
    return ("", True) if blocks else (text, False)


def programs(completion: str, prefix: str = "") -> list[str]:
    """The programs that a completion may mean, most likely first; the sandbox takes the first that compiles. Empty: there is no code.

    With a prefix (HumanEval's prompt) the completion either goes on with it or gives the whole function, which then comes after it. A
    continuation that rambles on ends where its indentation does.
    """
    code, _ = extract_code(completion)
    if not code.strip() or len(code) > MAX_CODE_CHARACTERS:
        return []
    if not prefix:
        return [code]
    found = [prefix + code, f"{prefix.rstrip()}\n{code}"]
    lines = code.split("\n")
    ends = (n for n, line in enumerate(lines) if n > 0 and re.match(r"\S", line))
    kept = "\n".join(lines[: next(ends, len(lines))])
    if lines[0][:1].isspace() or not lines[0]:
        found += [prefix + kept]
    return [*found, code]


def _prefix(text: Any) -> str:
    """`text` where it is Python that a completion can go on with, else nothing."""
    if not isinstance(text, str):
        return ""
    for body in ("", "\n    pass\n"):
        try:
            tree = ast.parse(text.rstrip() + body)
            return text if any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in tree.body) else ""
        except (SyntaxError, ValueError, RecursionError):
            continue
    return ""


def _check_gold(*, prefix: str | None = None, **columns: Any) -> str | None:
    """Why the row's tests can't be used, or None."""
    try:
        read_tests(columns)
    except DataError as error:
        return str(error)
    if prefix is not None and not _prefix(columns.get(prefix)):
        return f"the column {prefix!r} holds no Python that a completion could go on with"
    return None


def _check_args(**args: Any) -> str | None:
    for name in ("test_seconds", "seconds", "memory_mb"):
        if name in args and not (isinstance(args[name], int | float) and args[name] > 0):
            return f"{name} must be a positive number, not {args[name]!r}"
    return None


@functools.cache
def _sandbox() -> Sandbox:
    made = Sandbox()
    if not made.files:
        logging.getLogger("llmrl.rewards").warning(
            "code is run without namespaces (%s): it can open no files, and import common modules of the standard library only",
            made.note,
        )
    return made


def _warm_up() -> None:
    _sandbox()


@row_verifier(check_gold=_check_gold, check_args=_check_args, warm_up=_warm_up, runs_code=True, seconds=ROW_SECONDS)
def code_tests(
    completion: str, prompt: Any = None, log_extra: Callable[[str, Any], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None, *, partial: bool = False, prefix: str | None = None,
    test_seconds: float = 8.0, seconds: float = 16.0, memory_mb: int = 1024, **columns: Any,
) -> float | None:  # fmt: skip
    """1.0 when the code in the completion passes all tests of the row, else 0.0; None when the row has no usable tests.

    partial: the share of tests that pass instead. prefix: the column with the code that the completion goes on with; default: the prompt,
    where the row has an `entry_point` and the prompt is Python. test_seconds and seconds: processor time of one test and of all of them.
    Code that takes too long, uses too much memory or is missing scores 0: that is the model's doing. Raises RewardError when
    the sandbox, or the tests themselves, can't be run.

    Example: code_tests.score("def f(x): return x + 1", tests=["assert f(1) == 2"]) -> 1.0
    """
    go_on = _prefix(columns.get(prefix) if prefix else prompt if columns.get("entry_point") else None)
    try:
        tests = read_tests(columns, go_on)
    except DataError:
        return None
    found = programs(completion_text(completion), go_on)
    limits = Limits(test_seconds, seconds, memory_mb=int(memory_mb))
    report = run_tests(found, tests, limits, stop=not partial) if found else Report([0.0] * tests.count, ["no code"])
    share = sum(report.shares) / tests.count
    passed = all(s == 1.0 for s in report.shares)
    status = "no code" if not found else "passed" if passed else "timeout" if report.timed_out else "failed"
    if log_extra is not None:
        log_extra("code_status", status)
    if log_metric is not None:
        log_metric("code/tests_passed", share)
        log_metric("code/timeouts", float(report.timed_out))
    return 1.0 if passed else Noted(share if partial else 0.0, _first_failure(tests, report) if found else "no code")


def _first_failure(tests: Tests, report: Report) -> str:
    """How many tests passed, and the first that did not."""
    failed = next(i for i, share in enumerate(report.shares) if share < 1.0)
    right = sum(share == 1.0 for share in report.shares)
    payload = tests.payload or {}
    if tests.kind == "asserts":
        shown = payload["tests"][failed]
    elif tests.kind == "calls":
        shown = f"{tests.entry}({', '.join(map(repr, payload['tests'][failed][0]))})"
    else:
        shown = f"input {tests.inputs[failed]!r}" if tests.inputs else "check"
    why = next((note for note in report.notes[failed:] if note), "failed")
    return " ".join(f"{right} of {tests.count} tests passed; {shown[:150]}: {why}".split())


def run_tests(found: list[str], tests: Tests, limits: Limits, *, stop: bool) -> Report:
    """Runs the tests in this process's sandbox. stop: at the first that fails. Raises RewardError, ConfigError where there is none."""
    try:
        return _run(_sandbox(), found, tests, limits, stop)
    except BrokenPipeError:
        pass
    _sandbox().close()
    _sandbox.cache_clear()
    try:
        return _run(_sandbox(), found, tests, limits, stop)
    except BrokenPipeError as error:
        raise RewardError(f"the sandbox's process ends again and again: {error}") from error


def _run(sandbox: Sandbox, found: list[str], tests: Tests, limits: Limits, stop: bool) -> Report:
    code = {"programs": found, "entry": tests.entry and tests.entry.partition(".")[0]}
    if tests.kind != "program":
        assert tests.payload is not None
        return sandbox.test(code, {**tests.payload, "stop": stop}, limits, tests.count)

    def accept(number: int, output: str) -> str | None:
        return None if same_output(output, tests.outputs[number]) else f"printed {output[:200]!r}"

    return sandbox.run(code, tests.inputs, limits, accept, stop)


def same_output(output: str, expected: str) -> bool:
    """Whether two texts are the same but for white space within lines and at their ends, and empty lines."""
    lines = [[line.split() for line in text.splitlines() if line.strip()] for text in (output, expected)]
    return lines[0] == lines[1]
