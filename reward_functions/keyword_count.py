r"""The share of the keywords that occur; or with `most` their occurrences, up to that number.

In a recipe by its name, for it is built in: `rewards: [{function: keyword_count}]`.

>>> keyword_count(completions=["First this, then that."], keywords=["first", "then"])  # right
[1.0]
>>> keyword_count(completions=["Firstly this"], keywords=["first", "then"])  # wrong: no whole word
[0.0]
>>> keyword_count(completions=["wait, wait"], keywords=["wait"], most=4)
[0.5]
>>> keyword_count(completions=[""], keywords=["first"])  # empty
[0.0]
>>> keyword_count(completions=["wait " * 100_000], keywords=["wait"], most=4)  # hostile: more is not better
[1.0]
"""

from llmrl.rewards.text import keyword_count

__all__ = ["keyword_count"]
