"""1.0 for "<think>...</think>...", else 0.0 (TRL's `think_format_reward`).

>>> think_format(completions=["<think>two and two</think>4"])  # right
[1.0]
>>> think_format(completions=["two and two is 4"])  # wrong
[0.0]
>>> think_format(completions=[""])  # empty
[0.0]
>>> think_format(completions=["<think>" * 100_000])  # hostile
[0.0]
"""

from llmrl.rewards.format import think_format

__all__ = ["think_format"]
