r"""How alike two unified diffs are, from 0 to 1; -1 for an answer that is none. Needs a column `answer`.

In a recipe by its name, for it is built in: `rewards: [{function: diff_similarity}]`.

>>> gold = "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\n import os\n-x = 1\n+x = 2\n"
>>> diff_similarity(completions=[f"Fixed:\n```diff\n{gold}```"], answer=[gold])  # right
[1.0]
>>> diff_similarity(completions=[gold.replace("+x = 2", "+x = 3")], answer=[gold])  # wrong: three of four lines
[0.75]
>>> diff_similarity(completions=["", "I don't know"], answer=[gold] * 2)  # empty
[-1.0, -1.0]
>>> diff_similarity(completions=["+\n" * 100_000], answer=[gold])  # hostile: refused by its size
[-1.0]
"""

from llmrl.rewards.structure import diff_similarity

__all__ = ["diff_similarity"]
