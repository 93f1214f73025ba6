"""Minerva Math (Lewkowycz et al. 2022, arXiv 2206.14858), 272 problems of university courses, as records.

python data_scripts/minerva_math.py --output data/minerva_math.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "minerva_math")
