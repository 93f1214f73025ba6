"""ARC-Easy (Clark et al. 2018, arXiv 1803.05457), test; `--split train` for training, as records.

python data_scripts/arc_easy.py --output data/arc_easy.jsonl
"""

from _common import benchmark

if __name__ == "__main__":
    benchmark(__doc__, "arc_easy")
