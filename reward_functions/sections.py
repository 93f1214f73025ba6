r"""The share of the named sections that are there once, in order and with text.

In a recipe by its name, for it is built in: `rewards: [{function: sections}]`.

>>> names = ["Plan", "Answer"]
>>> sections(completions=["# Plan\nadd\n# Answer\n4", "**Plan:** add\nAnswer: 4"], names=names)  # right
[1.0, 1.0]
>>> sections(completions=["# Answer\n4\n# Plan\nadd", "# Plan\nadd", "# Plan\n# Answer\n4"], names=names)  # wrong
[0.0, 0.5, 0.5]
>>> sections(completions=[""], names=names)  # empty
[0.0]
>>> sections(completions=["# Plan\n" * 100_000, "#" * 1_000_000], names=names)  # hostile
[0.0, 0.0]
"""

from llmrl.rewards.format import sections

__all__ = ["sections"]
