"""ARC-Challenge (Clark et al. 2018, arXiv 1803.05457), test; `--split train` for training, as records.

python data_scripts/arc_challenge.py --output data/arc_challenge.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "arc_challenge")
