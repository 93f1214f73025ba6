"""AMC 12 2023, 40 problems with a whole number as the answer, as records.

python data_scripts/amc23.py --output data/amc23.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "amc23")
