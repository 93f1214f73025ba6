r"""1.0 when the assignment in the answer satisfies the clauses: lists of literals, or DIMACS text, in a column `clauses`.

In a recipe by its name, for it is built in: `rewards: [{function: sat_assignment}]`.

>>> clauses = ["p cnf 3 3\n1 2 0\n-2 3 0\n-1 0"]
>>> sat_assignment(completions=["<answer>x1 = false, x2 = true, x3 = true</answer>"], clauses=clauses)  # right
[1.0]
>>> sat_assignment(completions=["v -1 2 3 0"], clauses=[[[1, 2], [-2, 3], [-1]]])  # right, as solvers print it
[1.0]
>>> sat_assignment(completions=["x1 = false, x2 = true"], clauses=clauses)  # wrong: nothing said about x3
[0.0]
>>> sat_assignment(completions=["x1 = false, x2 = true"], clauses=clauses, partial=True)
[0.6666666666666666]
>>> sat_assignment(completions=[""], clauses=clauses)  # empty
[0.0]
>>> sat_assignment(completions=["1 -1 2 -2 3 -3", "9" * 100_000, "-" * 100_000], clauses=clauses * 3)  # hostile: every value at once
[0.0, 0.0, 0.0]
"""

from llmrl.rewards.structure import sat_assignment

__all__ = ["sat_assignment"]
