"""What a row may look like, and which rows can't be used and why.

TRL's types: `text`; `messages`; `prompt` and `completion`; `prompt` alone; the last two as strings or as lists of messages.
Rows in Alpaca's form (`instruction`, `input`, `output`) and ShareGPT's (`conversations` of `from` and `value`) are converted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrl.data.sources import Row
from llmrl.errors import DataError
from llmrl.types import Messages

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
ALIASES = {
    "prompt": ("question", "problem", "query", "instruction", "input"),
    "completion": ("solution", "response", "answer", "output"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat"),
    "text": ("content", "body", "document"),
}


@dataclass(frozen=True)
class TextRow:
    """Plain strings: a `prompt` that is not learned (empty for a `text` row) and what is."""

    prompt: str
    completion: str
    origin: str


@dataclass(frozen=True)
class ChatRow:
    """A conversation; assistant turns from index `first` on are learned."""

    messages: Messages
    first: int
    tools: list[Any] | None
    template_kwargs: Mapping[str, Any]
    origin: str


@dataclass(frozen=True)
class PromptRow:
    """Something to answer: a plain string, or a conversation."""

    text: str | Messages
    tools: list[Any] | None
    template_kwargs: Mapping[str, Any]
    columns: Mapping[str, Any]
    origin: str


@dataclass
class Problems:
    """Collects what is wrong with rows, so that one run names many of them."""

    limit: int = 10
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, origin: str, message: str) -> None:
        self.found.setdefault(message, []).append(origin)

    def raise_if_any(self) -> None:
        """Raises one DataError with the first `limit` different problems and, for each, the rows that have it."""
        if not self.found:
            return
        lines = []
        for message, origins in list(self.found.items())[: self.limit]:
            more = f" and {len(origins) - 3} more" if len(origins) > 3 else ""
            lines.append(f"{', '.join(origins[:3])}{more}: {message}")
        if len(self.found) > self.limit:
            lines.append(f"... and {len(self.found) - self.limit} other problems")
        rows = len({origin for origins in self.found.values() for origin in origins})
        raise DataError(f"{rows} row{'s' if rows > 1 else ''} can't be used:\n  " + "\n  ".join(lines))


def read_sft(rows: Sequence[Row], *, system_prompt: str | None = None) -> list[TextRow | ChatRow]:
    """Checked rows for supervised fine-tuning; raises one DataError that lists the bad ones.

    `prompt` and `completion` count before `messages`, `messages` before `text`. A system prompt is put before conversations that
    have none, and makes a conversation of prompt-completion rows of strings; to a `text` row it can't be applied.
    """
    problems, out = Problems(), []
    for row in rows:
        try:
            out.append(sft_row(row, system_prompt))
        except DataError as error:
            problems.add(row.origin, str(error))
    problems.raise_if_any()
    return out


def read_prompts(rows: Sequence[Row], *, system_prompt: str | None = None) -> list[PromptRow]:
    """Checked prompts; raises one DataError that lists the bad rows.

    A string stays a plain string (it is not put through the chat template), unless there is a system prompt, which makes it the
    user's turn of a conversation. `columns` are all columns but prompt, completion and completion_ids. Where there is no column
    `prompt`, see `prompt_column`.
    """
    problems, out = Problems(), []
    for row in rows:
        try:
            out.append(_prompt_row(row, system_prompt))
        except DataError as error:
            problems.add(row.origin, str(error))
    problems.raise_if_any()
    return out


def sft_row(row: Row, system_prompt: str | None) -> TextRow | ChatRow:
    values = as_messages(row.values)
    if "prompt" in values and "completion" in values:
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError("columns 'prompt' and 'completion' must both be strings, or both lists of messages")
        if isinstance(prompt, str):
            not_blank(prompt, "prompt")
            not_blank(completion, "completion")
            if system_prompt is None:
                return TextRow(prompt, completion, row.origin)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return chat_row(messages, 1, values, row.origin, system_prompt)
        before = read_prompt_messages(prompt, "prompt")
        if before[-1]["role"] == "assistant":
            raise DataError(
                "column 'prompt' ends with an assistant message; the completion must answer a user or a tool"
            )
        after = read_messages(completion, "completion")
        if after[0]["role"] != "assistant":
            raise DataError(f"column 'completion' must start with an assistant message, not {after[0]['role']!r}")
        return chat_row([*before, *after], len(before), values, row.origin, system_prompt)
    if "messages" in values:
        return chat_row(read_prompt_messages(values["messages"], "messages"), 0, values, row.origin, system_prompt)
    if "text" in values:
        not_blank(values["text"], "text")
        if system_prompt is not None:
            raise DataError("system_prompt can't be applied to a 'text' row; leave it out, or give 'messages'")
        return TextRow("", values["text"], row.origin)
    wanted = "completion" if "prompt" in values else "prompt" if "completion" in values else None
    raise DataError(_missing(wanted, "'text', 'messages', or 'prompt' and 'completion'", values))


def _prompt_row(row: Row, system_prompt: str | None) -> PromptRow:
    values = row.values
    name = prompt_column(values)
    if name is None:
        raise DataError(_missing("prompt", "'prompt'", values))
    text = values[name]
    if isinstance(text, str):
        not_blank(text, name)
        if system_prompt is not None:
            text = _with_system([{"role": "user", "content": text}], system_prompt)
    else:
        text = _with_system(read_prompt_messages(text, name), system_prompt)
    columns = {k: v for k, v in values.items() if k not in ("prompt", "completion", "completion_ids")}
    return PromptRow(text, _tools(values), _template_kwargs(values), columns, row.origin)


def prompt_column(values: Mapping[str, Any]) -> str | None:
    """`prompt`; without it `question` or `problem`, as benchmarks call it, where only one of them is there."""
    if "prompt" in values:
        return "prompt"
    names = [name for name in ("question", "problem") if name in values]
    return names[0] if len(names) == 1 else None


def chat_row(
    messages: Messages, first: int, values: Mapping[str, Any], origin: str, system_prompt: str | None
) -> ChatRow:
    full = _with_system(messages, system_prompt)
    first += len(full) - len(messages)
    learned = [i for i, m in enumerate(full) if m["role"] == "assistant" and i >= first]
    if not learned:
        raise DataError("no assistant message, so no token to learn from")
    for i in learned:
        if not (full[i].get("content") or full[i].get("tool_calls") or full[i].get("reasoning_content")):
            raise DataError(
                f"message {i} (assistant) is empty: the model would learn to say nothing; remove the row or the turn"
            )
    return ChatRow(full, first, _tools(values), _template_kwargs(values), origin)


def _with_system(messages: Messages, system_prompt: str | None) -> Messages:
    if system_prompt is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def read_prompt_messages(value: Any, column: str) -> Messages:
    """Messages that can be answered: somebody other than the assistant speaks first, and says something."""
    messages = read_messages(value, column)
    for message in messages:
        if message["role"] not in ("system", "developer"):
            if message["role"] != "user":
                raise DataError(
                    f"column {column!r}: the first message after the system's must be the user's, not {message['role']!r}"
                )
            break
    else:
        raise DataError(f"column {column!r} has a system message only; the prompt is empty")
    if not any((m.get("content") or "").strip() for m in messages if m["role"] == "user"):
        raise DataError(f"column {column!r}: every user message is empty")
    return messages


def read_messages(value: Any, column: str) -> Messages:
    """A list of messages with a known role and string content. Keys that are null (as Arrow fills them in) are left out."""
    if not isinstance(value, list):
        raise DataError(f"column {column!r} must be a list of messages, got {shown(value)}")
    if not value:
        raise DataError(f"column {column!r} is an empty list")
    out = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or "role" not in message:
            raise DataError(
                f"column {column!r}, message {i} must be an object with 'role' and 'content', got {shown(message)}"
            )
        if message["role"] not in ROLES:
            raise DataError(
                f"column {column!r}, message {i} has role {message['role']!r}; known roles: {', '.join(ROLES)}"
            )
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(
                f"column {column!r}, message {i} ({message['role']}): content must be a string, got {shown(content)}"
            )
        out.append({k: v for k, v in message.items() if v is not None or k == "content"})
    return out


def not_blank(value: Any, column: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"column {column!r} must be a string, got {shown(value)}")
    if not value.strip():
        raise DataError(f"column {column!r} is empty")


def _tools(values: Mapping[str, Any]) -> list[Any] | None:
    tools = _from_json(values.get("tools"), "tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            f"column 'tools' must be a list of JSON schemas, or that list as a JSON string, got {shown(tools)}"
        )
    return tools


def _template_kwargs(values: Mapping[str, Any]) -> Mapping[str, Any]:
    kwargs = _from_json(values.get("chat_template_kwargs"), "chat_template_kwargs")
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise DataError(
            f"column 'chat_template_kwargs' must be an object, or that object as a JSON string, got {shown(kwargs)}"
        )
    return {k: v for k, v in kwargs.items() if v is not None}


def _from_json(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"column {column!r} is a string, but not JSON ({error})") from error


def as_messages(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Alpaca's and ShareGPT's columns as `messages`, which then count before a `text` that says it all again; everything else as it is."""
    if "messages" in values or "completion" in values:
        return values
    if isinstance(values.get("instruction"), str) and isinstance(values.get("output"), str):
        asked = "\n\n".join(part for part in (values["instruction"], values.get("input")) if part)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": values["output"]}]
        system = [{"role": "system", "content": values["system"]}] if values.get("system") else []
        return {**values, "messages": [*system, *messages]}
    turns = values.get("conversations")
    if (
        isinstance(turns, list)
        and turns
        and all(isinstance(t, Mapping) and {"from", "value"} <= t.keys() for t in turns)
    ):
        named = [{"role": SHAREGPT_ROLES.get(t["from"], t["from"]), "content": t["value"]} for t in turns]
        return {**values, "messages": named}
    return values


def _missing(wanted: str | None, needed: str, values: Mapping[str, Any]) -> str:
    message = f"no column {needed}; columns: {', '.join(values) or 'none'}"
    if wanted is not None:
        message = f"no column {wanted!r} (needed: {needed}); columns: {', '.join(values)}"
    hints = [
        f"{target}: {name}"
        for target in ([wanted] if wanted else ALIASES)
        for name in [next((a for a in ALIASES[target] if a in values), None)]
        if name is not None and target not in values
    ]
    if hints:
        return f"{message}. Rename with `columns: {{{', '.join(hints)}}}` in the recipe's data source"
    return f"{message}. Rename with `columns: {{{wanted or 'messages'}: <your column>}}` in the recipe's data source"


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
