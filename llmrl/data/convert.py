"""Rows of published data sets -> the one form that data scripts write and benchmarks read.

The form: `{id, source, messages, answer, verifier, meta}`. `messages` ends with the user's turn that holds the bare problem, without
instructions on the format; `answer` is a non-empty string (for code and instructions the empty string: what decides is in `meta`);
`verifier` names the built-in reward that judges; `meta` holds every other column that the verifier or a breakdown needs.
A row that has this form already passes unchanged (`read`).

Converters take the columns of the hub's data sets, and of copies that rename them (`problem` or `question`, `Answer`); ids are made
the same from each, so that predictions fit whichever was asked. Rows that are no part of the set give None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from llmrl.errors import DataError
from llmrl.functional.boxed import last_boxed

Record = dict[str, Any]
Converter = Callable[[Mapping[str, Any], int], "Record | None"]
FIELDS = ("id", "source", "messages", "answer", "verifier", "meta")
NO_ANSWER = ("instructions", "code_tests")
"""Verifiers that judge by columns of `meta`."""
RESERVED = ("id", "answer", "verifier", "prompt", "messages")


def is_record(row: Mapping[str, Any]) -> bool:
    """Whether the row has the form already."""
    return all(name in row for name in FIELDS)


def read(row: Mapping[str, Any], index: int, convert: Converter) -> Record | None:
    """The row in the form; `index` is its place in the file, from 0. Raises DataError for what can't be used, KeyError never."""
    if is_record(row):
        return checked(row)
    try:
        return convert(row, index)
    except KeyError as error:
        raise DataError(f"no column {error}; the row has: {', '.join(map(str, row))}") from None


def checked(row: Mapping[str, Any]) -> Record:
    """A row that has the form's columns, as it is. Raises DataError when they don't hold what they should."""
    messages, answer = row["messages"], row["answer"]
    name = f"row {row['id']!r}"
    if not str(row["id"]).strip():
        raise DataError(f"{name}: the id is empty")
    turns = isinstance(messages, list | tuple) and messages and all(isinstance(m, Mapping) for m in messages)
    if not turns or messages[-1].get("role") != "user" or not str(messages[-1].get("content") or "").strip():
        raise DataError(
            f"{name}: `messages` must be a list of turns that ends with the user's, which holds the problem"
        )
    if not isinstance(row["meta"], Mapping):
        raise DataError(f"{name}: `meta` must be a mapping of columns, given {type(row['meta']).__name__}")
    if row["verifier"] not in NO_ANSWER and not str("" if answer is None else answer).strip():
        raise DataError(f"{name}: the answer is empty, so no completion could be judged")
    kept = {key: value for key, value in row["meta"].items() if value is not None}
    return {**row, "id": str(row["id"]), "answer": "" if answer is None else str(answer), "meta": kept}


def record(
    id: str, source: str, question: str, answer: str, verifier: str, meta: Mapping[str, Any] | None = None
) -> Record:
    """A row of the form; columns of `meta` that are None are left out. Raises DataError for an empty id, question or answer."""
    messages = [{"role": "user", "content": question}]
    made = {
        "id": id,
        "source": source,
        "messages": messages,
        "answer": answer,
        "verifier": verifier,
        "meta": meta or {},
    }
    return checked(made)


def pick(row: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """The first of these columns that is there and not null, also when the row writes it with other capitals."""
    lower = {str(key).lower(): key for key in reversed(list(row))}
    for name in names:
        key = name if name in row else lower.get(name.lower())
        if key is not None and row[key] is not None:
            return row[key]
    return default


def needed(row: Mapping[str, Any], *names: str) -> str:
    """The text of a column that must be there, as `pick` finds it. Raises KeyError, DataError where it is empty."""
    value = pick(row, *names)
    if value is None:
        raise KeyError(" or ".join(names))
    if not str(value).strip():
        raise DataError(f"the column {names[0]!r} is empty")
    return str(value)


def named(row: Mapping[str, Any], prefix: str, index: int, *names: str) -> str:
    """An id of the form PREFIX/OWN, of the row's own id (by default column `id`) or its place."""
    own = str(pick(row, *(names or ("id",)), default=index))
    return own if own.startswith(f"{prefix}/") else f"{prefix}/{own}"


def answer_of(row: Mapping[str, Any], *names: str) -> str:
    r"""The reference answer as text, else the last `\boxed{}` of the solution. Raises DataError when there is none."""
    answer = pick(row, *(names or ("answer",)))
    if answer is None and (solution := pick(row, "solution")) is not None:
        answer = last_boxed(str(solution))
        if answer is None or not answer.strip():
            raise DataError(r"there is no column 'answer', and no \boxed{} in the solution")
    if answer is None:
        raise KeyError((names or ("answer",))[0])
    if not str(answer).strip():
        raise DataError("the column 'answer' is empty, so no completion could be judged")
    return str(answer)


def integer(answer: str) -> str:
    """A whole number without leading zeros or a decimal point: "073" is "73", "27.0" is "27". Raises DataError for all else."""
    try:
        value = Decimal(answer.strip().replace(",", ""))
        whole = int(value)
    except (InvalidOperation, ValueError, OverflowError):
        raise DataError(f"the answer {answer!r} is not a whole number") from None
    if whole != value:
        raise DataError(f"the answer {answer!r} is not a whole number")
    return str(whole)


def math500(row: Mapping[str, Any], index: int) -> Record:
    """HuggingFaceH4/MATH-500: problem, solution, answer, subject, level, unique_id."""
    meta = {key: row.get(key) for key in ("subject", "level", "solution")}
    id = named(row, "math500", index, "id", "unique_id")
    return record(id, "MATH-500", needed(row, "problem"), answer_of(row), "math_answer", meta)


def _competition(prefix: str, source: str) -> Converter:
    """Problems whose answer is a whole number: AIME and AMC, in all of their copies."""

    def convert(row: Mapping[str, Any], index: int) -> Record:
        question, answer = needed(row, "problem", "question"), integer(answer_of(row))
        meta = {key: pick(row, key) for key in ("solution", "url")}
        return record(named(row, prefix, index), source, question, answer, "math_answer", meta)

    return convert


def olymmath(row: Mapping[str, Any], index: int) -> Record:
    """RUC-AIBOX/OlymMATH: problem, answer, subject, unique_id, which says whether it is of the easier or the harder half."""
    id = str(pick(row, "id", "unique_id", default=f"olymmath/{index}"))
    difficulty = next((name for name in ("easy", "hard") if f"-{name}-" in id.lower()), None)
    meta = {"subject": pick(row, "subject"), "difficulty": difficulty}
    return record(id, "OlymMATH", needed(row, "problem"), answer_of(row), "math_answer", meta)


def minerva(row: Mapping[str, Any], index: int) -> Record:
    r"""math-ai/minervamath and Qwen's file: problem (or question), solution, type, idx. Where there is no answer: the last `\boxed{}`."""
    meta = {"subject": pick(row, "subject", "type"), "solution": pick(row, "solution")}
    question, answer = needed(row, "problem", "question"), answer_of(row)
    answer = re.sub(r"\bnp\.(\w+)", r"\\\1", answer)  # one is in the notation of numpy: np.arcsin(10/13)
    return record(named(row, "minerva", index, "id", "idx"), "Minerva Math", question, answer, "math_answer", meta)


def olympiadbench(row: Mapping[str, Any], index: int) -> Record:
    """Hothan/OlympiadBench: question, context, solution and final_answer (lists), is_multiple_answer, unit, answer_type, error, subfield.

    The reference has its unit behind it, so that an answer in another one is told; `error` is the published absolute tolerance.
    """
    answer = pick(row, "final_answer", "answer_raw", "answer")
    if answer is None:
        raise KeyError("final_answer")
    parts = [str(a) for a in answer] if isinstance(answer, list | tuple) else [str(answer)]
    text = ", ".join(_without_dollars(part) for part in parts)
    if not text.strip(" ,$"):
        raise DataError("final_answer is empty")
    unit, error = str(pick(row, "unit", default="")).strip(), pick(row, "error", default="")
    if unit and not row.get("is_multiple_answer"):
        text += _unit(unit)
    solution = pick(row, "solution")
    meta = {
        "subject": pick(row, "subfield", "subject"),
        "answer_type": row.get("answer_type"),
        "is_multiple_answer": row.get("is_multiple_answer"),
        "error": _number(error) if str(error).strip() else None,
        "solution": solution[0] if isinstance(solution, list | tuple) and solution else solution,
    }
    question = needed(row, "problem", "question")
    if context := pick(row, "context"):
        question = f"{context}\n{question}"
    return record(named(row, "olympiadbench", index), "OlympiadBench", question, text, "math_answer", meta)


def _without_dollars(answer: str) -> str:
    """Without the `$` around all of an answer, or around each of several: "$8$,$4$" is "8, 4"."""
    answer = answer.strip().rstrip(".").strip()
    return answer.replace("$", "")


def _unit(unit: str) -> str:
    r"""A unit as it stands behind a number: "^{\circ}", r"\text{ km}", r"\text{ cm}^2". A percent sign is left out, since 4.2 is right too."""
    name, power, exponent = unit.replace("$", "").partition("^")
    if not name:
        return unit
    return "" if name in ("%", "\\%") else rf"\text{{ {name}}}{power}{exponent}"


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"the error {value!r} is no number") from None


def gsm8k(row: Mapping[str, Any], index: int) -> Record:
    """openai/gsm8k: question, answer, which is the worked solution and, after "####", the number."""
    solution, marked, number = str(pick(row, "answer", default="")).rpartition("####")
    answer = integer(number if marked else answer_of(row))
    id = str(pick(row, "id", default=f"gsm8k/test/{index:05d}"))
    meta = {"solution": solution.strip() if marked else pick(row, "solution")}
    return record(id, "GSM8K", needed(row, "question"), answer, "math_answer", meta)


def arc(row: Mapping[str, Any], index: int) -> Record:
    """allenai/ai2_arc: id, question, choices {text, label}, answerKey. Labels may be 1-4 and become letters; there are 3 to 5 choices."""
    choices = row["choices"]
    if isinstance(choices, Mapping):
        choices = [
            {"label": label, "text": text} for label, text in zip(choices["label"], choices["text"], strict=True)
        ]
    labels = [str(c["label"]).strip() for c in choices]
    key = needed(row, "answerKey", "answer").strip()
    if key not in labels or len(set(labels)) < len(labels):
        raise DataError(f"the key {key!r} is not one of the choices' labels, {', '.join(labels)}")
    lettered = [{"label": chr(ord("A") + i), "text": str(c["text"])} for i, c in enumerate(choices)]
    letter = lettered[labels.index(key)]["label"]
    return record(str(row["id"]), "ARC", needed(row, "question"), letter, "multiple_choice", {"choices": lettered})


def ifeval(row: Mapping[str, Any], index: int) -> Record:
    """google/IFEval: key, prompt, instruction_id_list, kwargs, where the hub fills in null for every argument that is not used."""
    ids, kwargs = row["instruction_id_list"], row["kwargs"]
    given = [{key: value for key, value in (k or {}).items() if value is not None} for k in kwargs]
    meta = {"instruction_id_list": list(ids), "kwargs": given, "instructions": len(ids)}
    return record(named(row, "ifeval", index, "id", "key"), "IFEval", needed(row, "prompt"), "", "instructions", meta)


def humaneval(row: Mapping[str, Any], index: int) -> Record:
    """openai/openai_humaneval: task_id, prompt, canonical_solution, test, entry_point. `code_prompt` is what a completion goes on with."""
    prompt = needed(row, "prompt")
    meta = {"code_prompt": prompt, "canonical_solution": row.get("canonical_solution")}
    meta |= {"test": needed(row, "test"), "entry_point": needed(row, "entry_point")}
    return record(named(row, "HumanEval", index, "id", "task_id"), "HumanEval", prompt, "", "code_tests", meta)


def mbpp(row: Mapping[str, Any], index: int) -> Record | None:
    """google-research-datasets/mbpp, sanitized (`mbpp_task`). None outside the official test split, 11-510."""
    made = mbpp_task(row, index)
    return made if 11 <= int(made["id"].removeprefix("mbpp/")) <= 510 else None


def mbpp_task(row: Mapping[str, Any], index: int) -> Record:
    """A task of any split: task_id, prompt, code, test_imports, test_list."""
    id = named(row, "mbpp", index, "id", "task_id")
    if not id.removeprefix("mbpp/").isdigit():
        raise DataError(f"the task_id {id.removeprefix('mbpp/')!r} is no number")
    tests = pick(row, "test_list", "tests")
    if not tests:
        raise DataError("there are no tests (column 'test_list')")
    meta = {"tests": list(tests), "test_imports": list(pick(row, "test_imports", default=[]))}
    meta["canonical_solution"] = pick(row, "code", "canonical_solution")
    return record(id, "MBPP sanitized", needed(row, "prompt"), "", "code_tests", meta)


def problem(row: Mapping[str, Any], index: int) -> Record:
    r"""Any file of problems: `problem`, `question` or `prompt`, and `answer` (else the last `\boxed{}` of `solution`).

    Every other column is kept; without an `id`, the row's place is one.
    """
    return _any(row, index, answer_of(row), "math_answer")


def prompt(row: Mapping[str, Any], index: int) -> Record:
    """Any file of prompts whose scorer needs no answer, or finds it in a column of its own: `prompt`, `question` or `problem`."""
    return _any(row, index, "", NO_ANSWER[0])


def _any(row: Mapping[str, Any], index: int, answer: str, verifier: str) -> Record:
    question: Any = pick(row, "problem", "question", "prompt", "messages")
    messages: Any = [{"role": "user", "content": question}] if isinstance(question, str) else question
    if question is None:
        raise KeyError("problem or question or prompt")
    used = ("problem", "question", *RESERVED)
    meta = {key: value for key, value in row.items() if str(key).lower() not in used}
    id, source = str(pick(row, "id", default=index)), str(row.get("source") or "")
    made = {"id": id, "source": source, "messages": messages, "answer": answer, "verifier": verifier, "meta": meta}
    return checked(made)


CONVERTERS: dict[str, Converter] = {
    "problem": problem,
    "prompt": prompt,
    "math500": math500,
    "aime24": _competition("aime24", "AIME 2024"),
    "aime25": _competition("aime25", "AIME 2025"),
    "amc23": _competition("amc23", "AMC 2023"),
    "olymmath": olymmath,
    "minerva": minerva,
    "olympiadbench": olympiadbench,
    "gsm8k": gsm8k,
    "arc": arc,
    "ifeval": ifeval,
    "humaneval": humaneval,
    "mbpp": mbpp,
}
