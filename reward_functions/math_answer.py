r"""1.0 when the final answer equals the reference as mathematics, else 0.0. Needs a column `answer` or `solution`.

In a recipe: `rewards: [{function: reward_functions/math_answer.py:math_answer}]`, or simply `rewards: math_answer`.

>>> columns = {"answer": ["1/2"]}
>>> math_answer(completions=[r"so it is \boxed{\frac{2}{4}}"], **columns)  # right
[1.0]
>>> math_answer(completions=[r"so it is \boxed{2}"], **columns)  # wrong
[0.0]
>>> math_answer(completions=[""], **columns)  # empty
[0.0]
>>> math_answer(completions=[r"\boxed{9^{9^{9^9}}}"], **columns)  # hostile: refused by its size
[0.0]
"""

from llmrl.rewards.math import math_answer

__all__ = ["math_answer"]
