"""Rewards for the form of a completion. All are linear in its length and run in the training process."""

from __future__ import annotations

import re

from llmrl.rewards.base import row_verifier


@row_verifier(safe=True)
def think_format(completion: str) -> float:
    """1.0 for "<think>...</think>...": the completion opens with the only <think>, which is closed (TRL's `think_format_reward`)."""
    good = completion.startswith("<think>") and completion.count("<think>") == 1 and "</think>" in completion
    return float(good)


@row_verifier(safe=True)
def think_answer_format(completion: str) -> float:
    r"""1.0 for "<think>\n...\n</think>\n<answer>\n...\n</answer>" and nothing around it (open-r1's `format`)."""
    if not completion.startswith("<think>\n") or not completion.endswith("\n</answer>"):
        return 0.0
    middle = re.search(r"\n</think>\n<answer>\n", completion)
    return float(
        middle is not None and middle.end() <= len(completion) - len("\n</answer>") and middle.start() >= len("<think>")
    )


@row_verifier(safe=True)
def tag_count(completion: str) -> float:
    r"""0.25 for each of "<think>\n", "\n</think>\n", "\n<answer>\n" and "\n</answer>" that occurs exactly once (open-r1's `tag_count`)."""
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return sum(0.25 for tag in tags if completion.count(tag) == 1)
