"""UltraFeedback, binarized (Cui et al. 2023, arXiv 2310.01377; Tunstall et al. 2023, arXiv 2310.16944), as preferences. Ties are left out.

python data_scripts/ultrafeedback.py --output data/ultrafeedback.jsonl
"""

from _common import training_set

from llmrl.data.convert_train import ultrafeedback

if __name__ == "__main__":
    training_set(__doc__, ultrafeedback, "HuggingFaceH4/ultrafeedback_binarized", split="train_prefs")
