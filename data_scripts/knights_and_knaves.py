"""Knights and knaves (Smullyan 1978) with one solution, made from a seed, as records.

python data_scripts/knights_and_knaves.py --count 5000 --difficulty 2-5 --seed 0 --output data/knights_and_knaves.jsonl
"""

from _common import puzzles

if __name__ == "__main__":
    puzzles(__doc__, "knights_and_knaves")
