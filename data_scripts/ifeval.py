"""IFEval (Zhou et al. 2023, arXiv 2311.07911), 541 prompts with instructions that a program checks, as records.

python data_scripts/ifeval.py --output data/ifeval.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "ifeval")
