"""One reward for a mixture of tasks: each row's column `verifier` names the built-in that judges it."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from llmrl.errors import ConfigError, DataError
from llmrl.rewards.base import RowVerifier, literal, parameters, row_verifier
from llmrl.rewards.code import ROW_SECONDS

NAMES = (
    "math_answer", "exact_match", "multiple_choice", "instructions", "code_tests", "text_match", "text_f1", "set_fbeta",
    "json_schema", "sat_assignment", "knights_and_knaves", "diff_similarity",
)  # fmt: skip
# open-instruct's names: ours, and with which arguments ours gives what theirs does.
OPEN_INSTRUCT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gsm8k": ("math_answer", {}),
    "math": ("math_answer", {}),
    "strict_math": ("math_answer", {}),
    "ifeval": ("instructions", {"partial": True}),
    "string_matcher": ("text_match", {}),
    "puzzle": ("text_match", {}),
    "flan": ("text_match", {}),
    "string_f1": ("text_f1", {}),
    "code": ("code_tests", {}),
    "code_stdio": ("code_tests", {}),
}


def builtin_of(name: Any) -> str | None:
    """The built-in that a row's `verifier` means, or None."""
    if name in NAMES:
        return str(name)
    return OPEN_INSTRUCT[name][0] if isinstance(name, str) and name in OPEN_INSTRUCT else None


def check_rows(columns: Mapping[str, list[Any]], *, allow_code: bool) -> None:
    """Raises ConfigError for a verifier that there is not, and for one that runs code where that is not allowed.

    columns: name -> a value a row.
    """
    named = Counter(json.dumps(name) for name in columns.get("verifier", ()))
    for text, count in named.items():
        name = json.loads(text)
        if builtin_of(name) is None:
            raise ConfigError(f"{count} row{'s' if count > 1 else ''} of the data: {_unknown(name)}")
        if builtin_of(name) == "code_tests" and not allow_code:
            raise ConfigError(
                f"{count} rows of the data are judged by running programs that the model wrote (verifier {name!r}), in a sandbox that is no "
                "boundary against a determined attacker (docs/code.md). If this machine may do that, say `allow_code_execution: true` "
                "in the recipe; else leave these rows out"
            )


def _unknown(name: Any) -> str:
    known = (*NAMES, *OPEN_INSTRUCT)
    near = difflib.get_close_matches(str(name), known, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."
    return f"no verifier {name!r}: {hint}"


def _inner(builtin: str) -> RowVerifier:
    from llmrl.rewards.load import import_target  # here, since that module lists this one

    found = import_target(builtin)
    assert isinstance(found, RowVerifier)
    return found


def columns_for(name: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The row's columns as the verifier reads them: open-instruct puts instructions and tests into its `ground_truth`, our `answer`.

    Raises DataError where those can't be read.
    """
    read = {"ifeval": _if_columns, "code": _test_columns, "code_stdio": _io_columns}.get(name)
    return {**columns, **(read(columns.get("answer")) if read is not None and not _has_own(name, columns) else {})}


def _has_own(name: str, columns: Mapping[str, Any]) -> bool:
    wanted = ("instruction_id_list",) if name == "ifeval" else ("tests", "test_list", "input_output", "outputs")
    return any(columns.get(column) for column in wanted)


def _if_columns(answer: Any) -> dict[str, Any]:
    return {"ground_truth": answer}


def _test_columns(answer: Any) -> dict[str, Any]:
    return {"tests": literal(answer)}


def _io_columns(answer: Any) -> dict[str, Any]:
    found = literal(answer)
    if not isinstance(found, list) or not all(
        isinstance(t, Mapping) and {"input", "output"} <= t.keys() for t in found
    ):
        raise DataError(
            f"the reference of a code_stdio row must be a list of input and output, given {str(answer)[:80]!r}"
        )
    return {"input_output": {"inputs": [t["input"] for t in found], "outputs": [t["output"] for t in found]}}


def _arguments(name: str, options: Mapping[str, Any] | None, columns: Mapping[str, Any]) -> dict[str, Any]:
    builtin = builtin_of(name)
    own = dict(OPEN_INSTRUCT.get(name, ("", {}))[1])
    if builtin == "code_tests" and columns.get(
        "code_prompt"
    ):  # HumanEval's records: the code that a completion goes on with
        own["prefix"] = "code_prompt"
    return {**own, **((options or {}).get(str(builtin)) or {})}


def _check_args(*, options: Any = None) -> str | None:
    if options is None:
        return None
    if not isinstance(options, Mapping):
        return f"options must be a mapping such as {{code_tests: {{partial: true}}}}, given {options!r}"
    from llmrl.rewards.load import bind

    for name, args in options.items():
        if name not in NAMES:
            return f"options: {_unknown(name)}"
        if not isinstance(args, Mapping):
            return f"options: {name} needs a mapping of arguments, given {args!r}"
        try:
            bind(_inner(name), args, name, name)
        except ConfigError as error:
            return str(error)
    return None


def _check_gold(*, verifier: Any = None, options: Mapping[str, Any] | None = None, **columns: Any) -> str | None:
    builtin = builtin_of(verifier)
    if builtin is None:
        return _unknown(verifier)
    check = _inner(builtin).check_gold
    try:
        read = columns_for(verifier, columns)
    except DataError as error:
        return str(error)
    return None if check is None else check(**read, **_arguments(verifier, options, columns))


def _read_answer(
    completion: str, *, verifier: Any = None, options: Mapping[str, Any] | None = None, **columns: Any
) -> str | None:
    builtin = builtin_of(verifier)
    read = None if builtin is None else _inner(builtin).read_answer
    return None if read is None else read(completion, **columns, **_arguments(verifier, options, columns))


def _warm_up() -> None:
    for name in ("math_answer", "instructions"):
        if (warm := _inner(name).warm_up) is not None:
            warm()


@row_verifier(
    check_gold=_check_gold, check_args=_check_args, warm_up=_warm_up, read_answer=_read_answer, by_row=True, seconds=ROW_SECONDS
)  # fmt: skip
def verifier(
    completion: str, verifier: Any, prompt: Any = None, log_extra: Callable[[str, Any], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None, *, options: Mapping[str, Any] | None = None, **columns: Any,
) -> float | None:  # fmt: skip
    """What the built-in that the column `verifier` names says of the row: one reward for a mixture of tasks.

    options: arguments of verifiers, `{code_tests: {partial: true}}`. The mean a verifier is logged as `verifier/<name>`. Known names
    are ours (NAMES) and open-instruct's (OPEN_INSTRUCT). Rows judged by code need `allow_code_execution: true`.
    Raises DataError for a name that there is not; a runner has refused it before.

    Example: verifier.score("Answer: B", "multiple_choice", answer="B") -> 1.0
    """
    builtin = builtin_of(verifier)
    if builtin is None:
        raise DataError(_unknown(verifier))
    inner = _inner(builtin)
    try:
        row = columns_for(verifier, columns)
    except DataError:
        return None
    given = {"completion": completion, "prompt": prompt, "log_extra": log_extra, "log_metric": log_metric}
    takes = parameters(inner)
    inputs = {k: v for k, v in {**row, **given}.items() if takes.takes(k) and k not in takes.keyword_only}
    if any(name not in inputs for name in takes.required):
        return None
    value: float | None = inner.score(**inputs, **_arguments(verifier, options, columns))
    if log_metric is not None and value is not None:
        log_metric(f"verifier/{builtin}", value)
    return value
