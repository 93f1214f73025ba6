r"""1.0 when all of a row's verifiable instructions are followed (IFEval). Needs the columns `instruction_id_list` and `kwargs`.

In a recipe by its name, for it is built in: `rewards: [{function: instructions}]`.

>>> columns = {"instruction_id_list": [["punctuation:no_comma", "length_constraints:number_words"]],
...     "kwargs": [[{}, {"num_words": 3, "relation": "at least"}]]}
>>> instructions(completions=["three good words"], **columns)  # right
[1.0]
>>> instructions(completions=["one, two"], **columns), instructions(completions=["one two"], **columns, partial=True)  # wrong
([0.0], [0.5])
>>> instructions(completions=[""], **columns)  # empty
[0.0]
>>> instructions(completions=["," * 1_000_000], **columns)  # hostile
[0.0]
"""

from llmrl.rewards.ifeval import instructions

__all__ = ["instructions"]
