r"""1.0 when the chosen letter is the reference's. Needs a column `answer` (a letter, or the text of one of `choices`).

In a recipe by its name, for it is built in: `rewards: [{function: multiple_choice}]`.

>>> multiple_choice(completions=["so the answer is (B).", "<answer>b</answer>", "Answer: Lyon"], answer=["B", "B", "B"],
...     choices=[["Paris", "Lyon"]] * 3)  # right
[1.0, 1.0, 1.0]
>>> multiple_choice(completions=["The answer is C.", "Maybe A or B?"], answer=["B", "B"])  # wrong
[0.0, 0.0]
>>> multiple_choice(completions=[""], answer=["B"])  # empty
[0.0]
>>> multiple_choice(completions=["B " * 100_000, "(" * 100_000, "answer is " * 100_000], answer=["B"] * 3)  # hostile
[0.0, 0.0, 0.0]
"""

from llmrl.rewards.choice import multiple_choice

__all__ = ["multiple_choice"]
