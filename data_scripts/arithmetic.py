"""Expressions with +, - and * to compute, made from a seed, as records.

python data_scripts/arithmetic.py --count 5000 --difficulty 2-5 --seed 0 --output data/arithmetic.jsonl
"""

from _common import puzzles

if __name__ == "__main__":
    puzzles(__doc__, "arithmetic")
