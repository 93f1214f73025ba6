"""Open-Reasoner-Zero's 57k problems (Hu et al. 2025, arXiv 2503.24290), as records; `--source` also takes orz_math_57k_collected.json.

python data_scripts/open_reasoner_zero.py --output data/open_reasoner_zero.jsonl
"""

from _common import training_set

from llmrl.data.convert_train import open_reasoner_zero

if __name__ == "__main__":
    training_set(__doc__, open_reasoner_zero, "Open-Reasoner-Zero/orz_math_57k_collection")
