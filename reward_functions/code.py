r"""1.0 when the Python in a completion passes all tests of the row, else 0.0. It runs that code: see docs/code.md.

In a recipe: `rewards: [{function: reward_functions/code.py:code_tests}]` or simply `rewards: code_tests`, and
`allow_code_execution: true`.

>>> tests = {"tests": [["assert double(2) == 4", "assert double(0) == 0"]]}
>>> code_tests(completions=["```python\ndef double(x):\n    return 2 * x\n```"], **tests)  # right
[1.0]
>>> code_tests(completions=["```python\ndef double(x):\n    return x + 2\n```"], **tests)  # wrong
[0.0]
>>> code_tests(completions=["```python\ndef double(x):\n    return x + 2\n```"], **tests, partial=True)  # one of two
[0.5]
>>> code_tests(completions=[""], **tests)  # empty
[0.0]
>>> code_tests(completions=["import os\nos._exit(0)"], **tests)  # hostile: no pass without the right values
[0.0]
"""

from llmrl.rewards.code import code_tests

__all__ = ["code_tests"]
