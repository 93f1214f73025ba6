"""Formulas in conjunctive normal form with one satisfying assignment, made from a seed, as records.

python data_scripts/sat.py --count 5000 --difficulty 2-5 --seed 0 --output data/sat.jsonl
"""

from _common import puzzles

if __name__ == "__main__":
    puzzles(__doc__, "sat")
