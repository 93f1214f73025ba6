"""AceCode-87K (Zeng et al. 2025, arXiv 2502.01718): Python problems with asserts, as records; `pass_rate` is of published samples.

python data_scripts/acecode.py --output data/acecode.jsonl
"""

from _common import training_set

from llmrl.data.convert_train import acecode

if __name__ == "__main__":
    training_set(__doc__, acecode, "TIGER-Lab/AceCode-87K")
