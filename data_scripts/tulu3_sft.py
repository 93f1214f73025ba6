"""Tulu 3's mixture of conversations (Lambert et al. 2024, arXiv 2411.15124), as records to learn from.

python data_scripts/tulu3_sft.py --output data/tulu3_sft.jsonl
"""

from _common import training_set

from llmrl.data.convert_train import tulu3_sft

if __name__ == "__main__":
    training_set(__doc__, tulu3_sft, "allenai/tulu-3-sft-mixture")
