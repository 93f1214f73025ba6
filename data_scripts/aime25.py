"""AIME 2025, both papers, 30 problems, as records.

python data_scripts/aime25.py --output data/aime25.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "aime25")
