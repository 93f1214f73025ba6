r"""1.0 when the answer is JSON that a schema admits (the recipe's `schema`, or a column `json_schema`). Needs `llmrl[graders]`.

In a recipe by its name, for it is built in: `rewards: [{function: json_schema}]`.

>>> schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
>>> json_schema(completions=['{"a": 1}', 'Here:\n```json\n{"a": 2}\n```'], schema=schema)  # right
[1.0, 1.0]
>>> json_schema(completions=['{"a": "1"}', "{'a': 1}", '{"a": 1} and more'], schema=schema)  # wrong
[0.0, 0.0, 0.0]
>>> json_schema(completions=[""], schema=schema)  # empty
[0.0]
>>> json_schema(completions=["[" * 100_000, "9" * 10_000, "```" * 100_000], schema=schema)  # hostile
[0.0, 0.0, 0.0]
"""

from llmrl.rewards.structure import json_schema

__all__ = ["json_schema"]
