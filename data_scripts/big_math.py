"""Big-Math-RL-Verified (Albalak et al. 2025, arXiv 2502.17387), as records with their origin, domain and an 8B model's solve rate.

python data_scripts/big_math.py --output data/big_math.jsonl
"""

from _common import training_set

from llmrl.data.convert_train import big_math

if __name__ == "__main__":
    training_set(__doc__, big_math, "SynthLabsAI/Big-Math-RL-Verified")
