"""Prompt templates that several benchmarks share; a benchmark's file names them under `prompts`.

Published numbers depend on the wording, so these are the ones that papers print. `{question}`: see `PromptTemplate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

TEMPLATES: Mapping[str, Mapping[str, Any]] = {
    # For instruct and reasoning models; DeepSeek-R1's model card asks for it, without a system's turn.
    "boxed": {"user": "{question}\n" + _BOXED},
    "qwen-boxed": {"system": "You are a helpful assistant.", "user": "{question}\n" + _BOXED},
    # Qwen2.5-Math-Instruct (arXiv 2409.12122).
    "qwen-math": {"system": _BOXED, "user": "{question}"},
    # DAPO (arXiv 2503.14476), its data and validation.
    "dapo": {
        "user": "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\n{question}\n\nRemember to put your answer on its own line "
        'after "Answer:".'
    },
    # For base models: DeepSeek-R1-Zero's (arXiv 2501.12948, table 1), with the open tag of Open-Reasoner-Zero (arXiv 2503.24290).
    "think": {
        "text": "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
        "thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are "
        "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
        "<answer> answer here </answer>. User: {question}\nAssistant: <think>",
        "cut": ["\nUser:"],
    },
    # For base models, as in Qwen2.5-Math's evaluation ("abel").
    "plain": {"text": "Question:\n{question}\nAnswer:\nLet's think step by step.\n", "cut": ["\nQuestion:"]},
    # The problem and nothing else ("no template" of Dr. GRPO, arXiv 2503.20783).
    "bare": {"text": "{question}\n"},
    # The user's turn is the problem: it says itself what is wanted.
    "chat": {"user": "{question}"},
}
