r"""F-beta of a set of answers against the reference's, in any order. Needs a column `answer`: a list, or "a, b, c".

In a recipe by its name, for it is built in: `rewards: [{function: set_fbeta}]`.

>>> set_fbeta(completions=["Answer: c, a and co, b"], answer=[["a and co", "b", "c"]])  # right, in any order
[1.0]
>>> set_fbeta(completions=["Answer: a, x, y, z"], answer=["a, b"])  # wrong: one of four, and one of two
[0.3333333333333333]
>>> set_fbeta(completions=["Answer: a, x, y, z"], answer=["a, b"], beta=2.0)  # recall counts more
[0.4166666666666667]
>>> set_fbeta(completions=[""], answer=["a, b"])  # empty
[0.0]
>>> set_fbeta(completions=[",".join(map(str, range(100_000)))], answer=["1, 2"])[0] < 1e-4  # hostile: everything at once
True
"""

from llmrl.rewards.text import set_fbeta

__all__ = ["set_fbeta"]
