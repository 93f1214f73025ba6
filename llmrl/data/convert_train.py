"""Rows of published training sets -> records (`llmrl.data.convert`), conversations to learn from, and preferences.

Conversations are records whose messages end with the assistant's turn, with `answer` and `verifier` empty. Preferences keep the form that
the trainers read: `{id, source, prompt, chosen, rejected}` of messages. A row that has its form already passes unchanged. DataError says
why a row can't be used; None is a row that is no part of the set.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llmrl.data import convert
from llmrl.data.convert import Record, answer_of, is_record, needed, pick, record
from llmrl.data.schemas import as_messages, read_messages
from llmrl.errors import DataError

_DAPO = (
    re.compile(r"^Solve the following math problem step by step\.[^\n]*\n\s*"),
    re.compile(r"\s*Remember to put your answer on its own line after \"Answer:\"\.?\s*$"),
)


def read(row: Mapping[str, Any], index: int, converter: convert.Converter) -> Record | None:
    """The row in its form; `index` is its place in the file, from 0. Raises DataError for what can't be used, KeyError for a missing column."""
    if is_record(row):
        last = row["messages"][-1] if isinstance(row["messages"], list) and row["messages"] else {}
        return conversation(row, index) if last.get("role") == "assistant" else convert.checked(row)
    if (
        all(isinstance(row.get(name), list) for name in ("prompt", "chosen", "rejected"))
        and {"id", "source"} <= row.keys()
    ):
        return _pair(row["id"], row["source"], row["prompt"], row["chosen"], row["rejected"], row)
    return converter(row, index)


def gsm8k(row: Mapping[str, Any], index: int) -> Record:
    """openai/gsm8k, train: question, answer with the number after "####"."""
    return {**convert.gsm8k({"id": f"gsm8k/train/{index:05d}", **row}, index), "source": "GSM8K train"}


def math(row: Mapping[str, Any], index: int) -> Record:
    r"""EleutherAI/hendrycks_math: problem, level ("Level 5"), type, solution; the answer is its last `\boxed{}`."""
    level = re.search(r"\d", str(row.get("level")))
    meta = {"subject": pick(row, "subject", "type"), "level": level and int(level.group()), "solution": row["solution"]}
    id = str(row.get("id") or f"math/train/{index:05d}")
    return record(id, "MATH train", needed(row, "problem"), answer_of(row), "math_answer", meta)


def dapo_math(row: Mapping[str, Any], index: int) -> Record:
    """BytedTsinghua-SIA/DAPO-Math-17k: prompt (messages), reward_model {ground_truth}, extra_info {index}; also open-r1's copy (prompt, solution).

    What the prompt says about the form of the answer, before and behind the problem, is cut off.
    """
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    for pattern in _DAPO:
        text = pattern.sub("", text)
    answer = (row.get("reward_model") or {}).get("ground_truth") or answer_of(row, "solution", "answer")
    own = (row.get("extra_info") or {}).get("index", index)
    return record(f"dapo-math/{own}", "DAPO-Math-17k", text.strip(), str(answer), "math_answer")


def open_reasoner_zero(row: Mapping[str, Any], index: int) -> Record:
    """Open-Reasoner-Zero, 57k: a list of {from: human, value} and {from: assistant, ground_truth: {value}}, on the hub as columns "0" and "1"."""
    question, answer = str(row["0"]["value"]), str(row["1"]["ground_truth"]["value"])
    return record(f"orz-57k/{index:05d}", "Open-Reasoner-Zero 57k", question.strip(), answer, "math_answer")


def deepscaler(row: Mapping[str, Any], index: int) -> Record:
    """agentica-org/DeepScaleR-Preview-Dataset: problem, answer, solution (often empty)."""
    meta = {"solution": pick(row, "solution") or None, "solve_rate": pick(row, "solve_rate")}
    id = convert.named(row, "deepscaler", index)
    return record(id, "DeepScaleR-Preview", needed(row, "problem"), answer_of(row), "math_answer", meta)


def big_math(row: Mapping[str, Any], index: int) -> Record:
    """SynthLabsAI/Big-Math-RL-Verified: problem, answer, source (which set it is from), domain (a list), llama8b_solve_rate."""
    own = row.get("source") if "origin" not in row else row["origin"]
    meta = {"origin": own, "domain": row.get("domain"), "llama8b_solve_rate": row.get("llama8b_solve_rate")}
    id = convert.named(row, "bigmath", index)
    return record(id, "Big-Math-RL-Verified", needed(row, "problem"), answer_of(row), "math_answer", meta)


def if_multi_constraints(row: Mapping[str, Any], index: int) -> Record:
    """allenai/IF_multi_constraints_upto5: key, messages, ground_truth (text of [{instruction_id: [...], kwargs: [...]}])."""
    given = row["ground_truth"]
    for reader in (json.loads, ast.literal_eval):
        if isinstance(given, str):
            try:
                given = reader(given)  # type: ignore[operator]
            except (ValueError, SyntaxError):
                continue
    given = given[0] if isinstance(given, list) and given else given
    if not isinstance(given, Mapping) or not given.get("instruction_id"):
        raise DataError("ground_truth holds no `instruction_id`")
    ids = list(given["instruction_id"])
    kwargs = [
        {k: v for k, v in (one or {}).items() if v is not None} for one in given.get("kwargs") or [None] * len(ids)
    ]
    meta = {"instruction_id_list": ids, "kwargs": kwargs, "instructions": len(ids)}
    text = str(_user_turn(row["messages"]))
    return record(f"if-multi/{row.get('key', index)}", "IF multi-constraints", text, "", "instructions", meta)


def _user_turn(messages: Any) -> Any:
    found = read_messages(messages, "messages")
    if [m["role"] for m in found] != ["user"]:
        raise DataError("messages is not one user's turn")
    return found[0]["content"]


def acecode(row: Mapping[str, Any], index: int) -> Record:
    """TIGER-Lab/AceCode-87K: id, source, question, test_cases (asserts), inferences {pass_rate, ...}: their mean is the row's `pass_rate`."""
    rates = [i["pass_rate"] for i in row.get("inferences") or () if i.get("pass_rate") is not None]
    tests = list(row["test_cases"] or ())
    if not tests:
        raise DataError("test_cases is empty")
    meta = {
        "tests": tests,
        "origin": row.get("source"),
        "pass_rate": round(sum(rates) / len(rates), 4) if rates else None,
    }
    return record(f"acecode/{row.get('id', index)}", "AceCode-87K", needed(row, "question"), "", "code_tests", meta)


def mbpp(row: Mapping[str, Any], index: int) -> Record | None:
    """google-research-datasets/mbpp, sanitized, as `convert.mbpp`, but the official training split, task ids 601 to 974."""
    made = convert.mbpp_task(row, index)
    return made if 601 <= int(str(made["id"]).removeprefix("mbpp/")) <= 974 else None


def conversation(row: Mapping[str, Any], index: int, *, prefix: str = "sft", source: str = "") -> Record:
    """A row with `messages`, or Alpaca's (instruction, input, output) or ShareGPT's (conversations of from and value) columns.

    Other columns are kept in `meta`, `tools` among them.
    """
    if is_record(row):
        messages, rest = row["messages"], dict(row["meta"])
    else:
        given = as_messages({k: v for k, v in row.items() if k != "completion"})
        if "messages" not in given:
            raise KeyError("messages, or instruction and output, or conversations")
        used = ("id", "source", "messages", "conversations", "instruction", "input", "output", "system", "text")
        messages, rest = given["messages"], {k: v for k, v in row.items() if k not in used and v is not None}
    messages = read_messages(messages, "messages")
    if messages[-1]["role"] != "assistant":
        raise DataError("the last message is not the assistant's")
    if any(m["role"] == "user" and not str(m.get("content") or "").strip() for m in messages):
        raise DataError("a user's turn is empty")
    if not (str(messages[-1].get("content") or "").strip() or messages[-1].get("tool_calls")):
        raise DataError("the assistant's last turn is empty")
    id = str(pick(row, "id", default=f"{prefix}/{index:06d}"))
    id = id if is_record(row) or id.startswith(f"{prefix}/") or prefix == "sft" else f"{prefix}/{id}"
    source = str(row.get("source") or source)
    return {"id": id, "source": source, "messages": messages, "answer": "", "verifier": "", "meta": rest}


def tulu3_sft(row: Mapping[str, Any], index: int) -> Record:
    """allenai/tulu-3-sft-mixture: id, messages, source (which set of the mixture)."""
    return conversation(row, index, prefix="tulu3", source="Tulu 3 SFT mixture")


def hh_rlhf(subset: str, split: str) -> Callable[[Mapping[str, Any], int], Record]:
    """Anthropic/hh-rlhf: chosen and rejected, each a transcript. The prompt is every turn but the last."""

    def converter(row: Mapping[str, Any], index: int) -> Record:
        chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
        if not chosen or not rejected:
            raise DataError("an empty turn, or roles that don't take turns")
        if chosen[:-1] != rejected[:-1]:
            raise DataError("the sides part before the last turn")
        id = f"hh-{subset}/{split}/{index:05d}"
        return _pair(id, f"HH-RLHF {subset} {split}", chosen[:-1], chosen[-1:], rejected[-1:])

    return converter


def turns(transcript: str) -> list[dict[str, str]]:
    """The messages of a transcript; empty if it is none, or its roles don't take turns from the human to the assistant.

    Example: turns("\\n\\nHuman: Hi\\n\\nAssistant: Hello") -> [{"role": "user", ...}, {"role": "assistant", "content": "Hello"}]
    """
    before, *parts = re.split(r"\n\n(Human|Assistant):", transcript)
    names = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": names[r], "content": text.strip()} for r, text in zip(parts[::2], parts[1::2])]
    in_turn = [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    return messages if not before.strip() and in_turn and all(m["content"] for m in messages) else []


def ultrafeedback(row: Mapping[str, Any], index: int) -> Record:
    """HuggingFaceH4/ultrafeedback_binarized, train_prefs: prompt_id, chosen and rejected (conversations), score_chosen, score_rejected."""
    chosen, rejected = read_messages(row["chosen"], "chosen"), read_messages(row["rejected"], "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise DataError("the sides part before the last turn")
    scores = {name: row.get(name) for name in ("score_chosen", "score_rejected")}
    if scores["score_chosen"] is not None and scores["score_chosen"] == scores["score_rejected"]:
        raise DataError("both sides have the same score")
    id = f"ultrafeedback/{row.get('prompt_id', index)}"
    return _pair(id, "UltraFeedback", chosen[:-1], chosen[-1:], rejected[-1:], scores)


def helpsteer(row: Mapping[str, Any], index: int) -> Record:
    """nvidia/HelpSteer3, preference: context (messages), response1, response2, overall_preference from -3 (1 is much better) to 3;
    or nvidia/HelpSteer2, preference: prompt (turns parted by <extra_id_1>), response_1, response_2, preference_strength.
    """
    if "context" in row:
        version, strength, answers = 3, row["overall_preference"], (row["response1"], row["response2"])
        prompt = read_messages(row["context"], "context")
    else:
        version, strength, answers = 2, row["preference_strength"], (row["response_1"], row["response_2"])
        first, *parts = re.split(r"\n?<extra_id_1>(User|Assistant)\n", row["prompt"])
        prompt = [{"role": "user", "content": first}]
        prompt += [{"role": r.lower(), "content": text} for r, text in zip(parts[::2], parts[1::2])]
    if not strength:
        raise DataError("neither side is preferred")
    better, worse = ([{"role": "assistant", "content": a}] for a in (answers if strength < 0 else answers[::-1]))
    more = {"strength": abs(strength), "domain": row.get("domain"), "language": row.get("language")}
    return _pair(f"helpsteer{version}/{index:05d}", f"HelpSteer{version}", prompt, better, worse, more)


def _pair(
    id: Any, source: Any, prompt: Any, chosen: Any, rejected: Any, more: Mapping[str, Any] | None = None
) -> Record:
    if not prompt or prompt[-1].get("role") != "user":
        raise DataError("the prompt does not end with the user's turn")
    if not all(side and all(str(m.get("content") or "").strip() for m in side) for side in (chosen, rejected)):
        raise DataError("an empty answer")
    if chosen == rejected:
        raise DataError("both sides say the same")
    made = {"id": str(id), "source": source, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {**made, **{k: v for k, v in (more or {}).items() if v is not None and k not in made}}
