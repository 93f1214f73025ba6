"""OlympiadBench (He et al. 2024, arXiv 2402.14008), the 675 open problems of mathematics in English, text only, as records.

python data_scripts/olympiadbench.py --output data/olympiadbench.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "olympiadbench")
