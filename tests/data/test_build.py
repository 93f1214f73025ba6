"""From rows to examples and prompts: every row type, every bad row, every length policy."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from llmrl.config.data import DatasetSource
from llmrl.config.grpo import GRPOConfig
from llmrl.config.sft import SFTConfig
from llmrl.data.build import build_prompts, build_sft_examples, prompts_from_rows, rows_of, split
from llmrl.data.sources import load_rows, rows_from
from llmrl.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "the"}, {"role": "assistant", "content": "answer"}
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sft(rows, tokenizer, stop_ids=(2,), **config):
    return build_sft_examples(
        rows_from(rows), tokenizer, SFTConfig(model_name_or_path="m", output_dir="o", **config), stop_ids
    )


def texts(tokenizer, examples):
    return [(tokenizer.decode(e.input_ids), tokenizer.decode(e.input_ids[e.loss_mask])) for e in examples]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = PLAIN
    return tokenizer


CHAT = ("<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\nanswer<|im_end|>\n", "answer<|im_end|>")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "the answer"}, ("the answer<|im_end|>", " answer<|im_end|>")),
        ({"prompt": "the", "completion": " answer"}, ("the answer<|im_end|>", " answer<|im_end|>")),
        ({"prompt": "the", "completion": " answer<|im_end|>"}, ("the answer<|im_end|>", " answer<|im_end|>")),
        ({"messages": [USER, ASSISTANT]}, CHAT),
        ({"prompt": [USER], "completion": [ASSISTANT]}, CHAT),
        ({"instruction": "the", "input": "", "output": "answer"}, CHAT),
        ({"instruction": "the", "input": "", "output": "answer", "text": "Below is an instruction. the answer"}, CHAT),
        ({"conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "answer"}]}, CHAT),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": None}], "other": 1}, CHAT),
    ],
)
def test_row_types(tokenizer, row, expected):
    examples, report = sft([row], tokenizer)
    if row.keys() == {"text"}:
        expected = (expected[0], tokenizer.decode(tokenizer(expected[0])["input_ids"][1:]))
    assert texts(tokenizer, examples) == [expected]
    assert (report.rows, report.examples, report.tokens) == (1, 1, len(examples[0]))
    assert report.supervised_tokens == examples[0].loss_mask.sum()
    assert examples[0].input_ids.dtype == np.int32 and examples[0].id == "dataset[0]"


def test_system_prompt(tokenizer):
    rows = [
        {"prompt": "the", "completion": "answer"},
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": "own"}, USER, ASSISTANT]},
    ]
    whole = [t for t, _ in texts(tokenizer, sft(rows, tokenizer, system_prompt="times")[0])]
    assert whole[:2] == ["<|im_start|>system\ntimes<|im_end|>\n" + CHAT[0]] * 2
    assert whole[2] == "<|im_start|>system\nown<|im_end|>\n" + CHAT[0]
    with pytest.raises(DataError, match="can't be applied to a 'text' row"):
        sft([{"text": "a"}], tokenizer, system_prompt="times")


def test_units_are_examples(tokenizer):
    examples, _ = sft([{"text": "the"}, {"text": "answer"}], tokenizer)
    assert [e.unit for e in examples] == [0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "solution": "s"}, r"no column 'text', .*columns: question, solution.*columns: {prompt: question, completion: solution}"),
        ({"prompt": "q", "response": "s"}, r"no column 'completion'.*columns: {completion: response}"),
        ({"body": "q"}, r"columns: {text: body}"),
        ({"prompt": "", "completion": "s"}, "column 'prompt' is empty"),
        ({"prompt": " \n", "completion": "s"}, "column 'prompt' is empty"),
        ({"prompt": "q", "completion": ""}, "column 'completion' is empty"),
        ({"prompt": 3, "completion": "s"}, "must both be strings"),
        ({"prompt": 3, "completion": 4}, "column 'prompt' must be a list of messages, got int 3"),
        ({"prompt": [USER], "completion": "s"}, "must both be strings, or both lists"),
        ({"prompt": [USER, ASSISTANT], "completion": [ASSISTANT]}, "'prompt' ends with an assistant message"),
        ({"prompt": [USER], "completion": [USER]}, "'completion' must start with an assistant message"),
        ({"text": None}, "column 'text' must be a string, got NoneType None"),
        ({"text": ""}, "column 'text' is empty"),
        ({"messages": []}, "column 'messages' is an empty list"),
        ({"messages": "hi"}, "column 'messages' must be a list of messages, got str 'hi'"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [ASSISTANT, USER]}, "must be the user's, not 'assistant'"),
        ({"messages": [{"role": "system", "content": "s"}]}, "system message only"),
        ({"messages": [{"role": "user", "content": " "}, ASSISTANT]}, "every user message is empty"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 1 has role 'bot'; known roles: system"),
        ({"messages": [USER, {"role": "assistant", "content": 7}]}, r"message 1 \(assistant\): content must be a string, got int 7"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]}, "content must be a string, got list"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content must be a string, got NoneType"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"message 1 \(assistant\) is empty"),
        ({"messages": [USER, "hi"]}, "message 1 must be an object"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "column 'tools' is a string, but not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "column 'tools' must be a list of JSON schemas"),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": [1]}, "column 'chat_template_kwargs' must be an object"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tokenizer, row, message):
    with pytest.raises(DataError, match=r"1 row can't be used:\n  dataset\[1\]: .*" + message):
        sft([{"text": "fine"}, row], tokenizer)


def test_many_bad_rows_make_one_message(tokenizer):
    rows = [{"text": ""}] * 5 + [{"text": i} for i in range(20)] + [{"text": "fine"}]
    with pytest.raises(DataError) as error:
        sft(rows, tokenizer)
    lines = str(error.value).splitlines()
    assert lines[0] == "25 rows can't be used:"
    assert lines[1] == "  dataset[0], dataset[1], dataset[2] and 2 more: column 'text' is empty"
    assert len(lines) == 12 and lines[-1] == "  ... and 11 other problems"


def test_overlong_rows(tokenizer):
    rows = [{"prompt": "the", "completion": " answer is 12 " * 5}, {"prompt": "the", "completion": " 12"}]
    examples, report = sft(rows, tokenizer, max_length=8)
    assert [e.id for e in examples] == ["dataset[1]"] and (report.dropped, report.truncated) == (1, 0)
    examples, report = sft(rows, tokenizer, max_length=8, on_overlong="truncate")
    assert [len(e) for e in examples] == [8, len(examples[1])] and (report.dropped, report.truncated) == (0, 1)
    assert examples[0].input_ids[-1] != 2 and examples[0].loss_mask.any()
    with pytest.raises(DataError, match=r"dataset\[0\]: \d+ tokens, max_length is 8"):
        sft(rows, tokenizer, max_length=8, on_overlong="error")
    with pytest.raises(DataError, match="all 1 rows are longer than max_length 8"):
        sft(rows[:1], tokenizer, max_length=8)


def test_truncation_that_leaves_nothing_to_learn_drops_the_row(tokenizer):
    rows = [{"prompt": "the answer is 12 because " * 9, "completion": "12"}, {"text": "the"}]
    _, report = sft(rows, tokenizer, max_length=8, on_overlong="truncate")
    assert (report.dropped, report.truncated, report.examples) == (1, 0, 1)


def test_the_models_limit_is_the_default(tokenizer):
    config = SFTConfig(model_name_or_path="m", output_dir="o", on_overlong="truncate")
    rows = rows_from([{"text": "the answer is 12 because three times four is twelve"}])
    assert len(build_sft_examples(rows, tokenizer, config, (2,), max_length=4)[0][0]) == 4


def test_a_template_that_never_writes_a_stop_token_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    row = {"messages": [USER, ASSISTANT]}
    with pytest.raises(
        DataError, match=r"dataset\[0\]: the last supervised token is 'Ċ' .*not a stop token \('<\|im_end\|>'\)"
    ):
        sft([row], other)
    long = {"messages": [USER, {"role": "assistant", "content": "answer " * 50}]}
    assert sft([long], tokenizer, max_length=30, on_overlong="truncate")[1].truncated == 1
    other.eos_token = None
    assert sft([row], other, stop_ids=())[1].examples == 1


def test_train_on_all(tokenizer):
    (example,), _ = sft([{"messages": [USER, ASSISTANT]}], tokenizer, train_on="all")
    assert example.loss_mask.tolist() == [False] + [True] * (len(example) - 2) + [False]


def test_tools_that_the_template_ignores_are_reported(tokenizer):
    rows = [{"messages": [USER, ASSISTANT], "tools": json.dumps([{"name": "f"}])}]
    assert "1 rows have tools, but the chat template does not write them" in sft(rows, tokenizer)[1].notes
    uses = copy.deepcopy(tokenizer)
    uses.chat_template = "{{ tools | tojson if tools }}" + PLAIN
    examples, report = sft(rows, uses)
    assert report.notes == () and texts(uses, examples)[0][0] == '[{"name": "f"}]' + CHAT[0]


def test_null_keys_as_arrow_fills_them_in_do_not_reach_the_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages if 'name' in m %}{{ m.name }}{% endfor %}" + PLAIN
    rows = [{"messages": [{**USER, "name": None}, ASSISTANT]}, {"messages": [{**USER, "name": "times"}, ASSISTANT]}]
    assert [t for t, _ in texts(other, sft(rows, other)[0])] == [CHAT[0], "times" + CHAT[0]]


def test_prompts(tokenizer):
    rows = rows_from([
        {"prompt": "the", "answer": "12", "completion": "c", "completion_ids": [1]},
        {"prompt": [USER], "id": "mine", "answer": "13"},
        {"prompt": "the", "answer": "14"},
        {"prompt": [USER], "id": "mine"},
    ])  # fmt: skip
    prompts, report = prompts_from_rows(rows, tokenizer)
    assert [p.text for p in prompts] == ["the", [USER], "the", [USER]]
    assert prompts[0].columns == {"answer": "12"} and prompts[1].columns == {"id": "mine", "answer": "13"}
    assert prompts[1].id == "mine" and prompts[3].id == "mine~2" and prompts[2].id == prompts[0].id + "~2"
    assert tokenizer.decode(prompts[0].ids) == "the"
    assert tokenizer.decode(prompts[1].ids) == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert report.examples == 4 and report.tokens == sum(len(p.ids) for p in prompts)


def test_prompt_ids_do_not_depend_on_other_rows(tokenizer):
    first = prompts_from_rows(rows_from([{"prompt": "the"}, {"prompt": "answer"}]), tokenizer)[0]
    second = prompts_from_rows(rows_from([{"prompt": "answer"}, {"prompt": "the"}]), tokenizer)[0]
    assert {p.id for p in first} == {p.id for p in second}


def test_prompt_settings_of_a_recipe(tokenizer):
    config = GRPOConfig(model_name_or_path="m", output_dir="o", system_prompt="times", max_prompt_length=60)
    prompts, _ = build_prompts(rows_from([{"prompt": "the"}, {"prompt": [USER]}]), tokenizer, config)
    assert [p.text for p in prompts] == [[{"role": "system", "content": "times"}, USER]] * 2


def test_overlong_prompts(tokenizer):
    rows = rows_from([{"prompt": "the answer is 12 because three"}, {"prompt": "12"}])
    prompts, report = prompts_from_rows(rows, tokenizer, max_prompt_length=4)
    assert len(prompts) == 1 and report.dropped == 1
    prompts, report = prompts_from_rows(rows, tokenizer, max_prompt_length=4, on_overlong="truncate")
    assert (
        list(prompts[0].ids) == tokenizer("the answer is 12 because three")["input_ids"][-4:] and report.truncated == 1
    )
    with pytest.raises(DataError, match=r"dataset\[0\]: the prompt has \d+ tokens, max_prompt_length is 4"):
        prompts_from_rows(rows, tokenizer, max_prompt_length=4, on_overlong="error")
    with pytest.raises(DataError, match="all 1 prompts are longer than max_prompt_length 4"):
        prompts_from_rows(rows[:1], tokenizer, max_prompt_length=4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "problem": "p"},
            r"no column 'prompt'.*columns: question, problem.*columns: {prompt: question}",
        ),
        ({"prompt": ""}, "column 'prompt' is empty"),
        ({"prompt": []}, "column 'prompt' is an empty list"),
        ({"prompt": None}, "column 'prompt' must be a list of messages, got NoneType"),
        ({"prompt": [ASSISTANT]}, "must be the user's"),
    ],
)
def test_bad_prompts_are_named(tokenizer, row, message):
    with pytest.raises(DataError, match=r"dataset\[1\]: .*" + message):
        prompts_from_rows(rows_from([{"prompt": "fine"}, row]), tokenizer)


def test_question_and_problem_are_the_prompt_where_there_is_no_other(tokenizer):
    rows = rows_from([{"prompt": "the", "question": "is"}, {"question": "is", "answer": "1"}, {"problem": "three"}])
    prompts, report = prompts_from_rows(rows, tokenizer)
    assert [p.text for p in prompts] == ["the", "is", "three"]
    assert prompts[1].columns == {"question": "is", "answer": "1"}
    assert len(report.notes) == 2 and "`problem` is the prompt" in report.notes[0]
    with pytest.raises(DataError, match="column 'question' is empty"):
        prompts_from_rows(rows_from([{"question": " "}]), tokenizer)


def test_rows_of_a_recipe(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"question": "q{i // 2}", "answer": "{i}"}}\n' for i in range(20)))
    config = GRPOConfig(model_name_or_path="m", output_dir="o", dataset=str(path), eval_fraction=0.3)
    rows, held_out = rows_of(config)
    assert (len(rows), len(held_out)) == (14, 6)
    asked = [{row.values["question"] for row in part} for part in (rows, held_out)]
    assert not asked[0] & asked[1]
    given = [{"prompt": "x"}]
    assert [len(part) for part in rows_of(config, given, given)] == [1, 1]
    config = config.model_copy(update={"eval_dataset": config.dataset})
    assert [len(part) for part in rows_of(config)] == [20, 20]
    assert [len(part) for part in rows_of(config, given)] == [1, 20]


def test_tool_calls_that_the_template_does_not_write_are_refused(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(DataError, match=r"dataset\[0\]: .*message 1 has tool_calls, .*the chat template"):
        sft([{"messages": messages}], tokenizer)
    with pytest.raises(DataError, match="message 1 has tool_calls"):
        prompts_from_rows(rows_from([{"prompt": [*messages, {"role": "tool", "content": "3"}]}]), tokenizer)


def test_sft_and_rl_see_the_same_prompt_tokens(tokenizer):
    for row in ({"prompt": "the", "completion": "answer"}, {"prompt": [USER], "completion": [ASSISTANT]}):
        (example,), _ = sft([row], tokenizer)
        (prompt,), _ = prompts_from_rows(rows_from([row]), tokenizer)
        assert tuple(example.input_ids[: len(prompt.ids)].tolist()) == prompt.ids
        assert np.flatnonzero(example.loss_mask)[0] == len(prompt.ids)


def test_split_is_by_prompt_and_seed():
    rows = rows_from([{"prompt": f"p{i % 50}", "n": i} for i in range(100)])
    train, held = split(rows, 0.2, seed=1)
    assert len(train) + len(held) == 100 and 20 <= len(held) <= 21
    assert not {r.values["prompt"] for r in train} & {r.values["prompt"] for r in held}
    assert [r.values["n"] for r in held] == sorted(r.values["n"] for r in held)
    assert split(rows, 0.2, seed=1)[1] == held != split(rows, 0.2, seed=2)[1]
    assert split(rows, 0.0)[1] == []
    with pytest.raises(DataError, match="can't be split"):
        split(rows_from([{"prompt": "same"}] * 5), 0.5)


def test_report_reads_well(tokenizer):
    summary = sft([{"prompt": "the", "completion": "answer"}], tokenizer)[1].summary()
    assert summary.startswith("1 rows -> 1 examples; 4 tokens; 3 of them supervised (75%); length mean 4, p50 4")


REAL = [
    ({"path": "sft_multiturn.jsonl"}, 1678),
    ({"path": "sft_dolly.jsonl.gz"}, 2981),
    ({"path": "train_gsm8k.jsonl", "columns": {"prompt": "question", "completion": "solution"}}, 7473),
]


@pytest.mark.parametrize(("source", "count"), REAL)
def test_real_files(tokenizer, source, count, request):
    from tests.conftest import shared_data

    path = shared_data(source["path"])
    rows = load_rows([DatasetSource(**{**source, "path": str(path)})])
    assert len(rows) == count
    rows = load_rows([DatasetSource(**{**source, "path": str(path), "max_rows": 400})])
    examples, _ = sft(rows, tokenizer)
    assert len(examples) == 400
    for example, row in zip(examples, rows):
        learned = [m["content"] for m in row.values.get("messages", ()) if m["role"] == "assistant"]
        learned = learned or [row.values["completion"]]
        assert tokenizer.decode(example.input_ids[example.loss_mask]) == "".join(t + "<|im_end|>" for t in learned)


def test_real_prompts(tokenizer):
    from tests.conftest import shared_data

    path = str(shared_data("train_gsm8k.jsonl"))
    rows = load_rows([DatasetSource(path=path, columns={"prompt": "question"}, max_rows=300)])
    prompts, _ = prompts_from_rows(rows, tokenizer)
    assert all(tokenizer.decode(p.ids) == p.text and p.columns["answer"] and p.id == p.columns["id"] for p in prompts)
