"""DAPO-Math-17k (Yu et al. 2025, arXiv 2503.14476), as records. The hub's file holds each problem about a hundred times, with an instruction
on the form of the answer before and behind it: both are taken away.

python data_scripts/dapo_math.py --output data/dapo_math.jsonl
"""

from _common import training_set

from llmrl.data.convert_train import dapo_math

if __name__ == "__main__":
    training_set(__doc__, dapo_math, "BytedTsinghua-SIA/DAPO-Math-17k")
