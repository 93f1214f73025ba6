"""HumanEval (Chen et al. 2021, arXiv 2107.03374), 164 functions to complete, as records.

python data_scripts/humaneval.py --output data/humaneval.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "humaneval")
