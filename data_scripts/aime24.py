"""AIME 2024, both papers, 30 problems, as records.

python data_scripts/aime24.py --output data/aime24.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "aime24")
