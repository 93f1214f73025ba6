"""MATH-500 (Lightman et al. 2023, arXiv 2305.20050), 500 problems, as records.

python data_scripts/math500.py --output data/math500.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "math500")
