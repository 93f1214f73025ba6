"""DeepScaleR-Preview (Luo et al. 2025), 40k competition problems, as records. It holds the AIME papers up to 2023.

python data_scripts/deepscaler.py --output data/deepscaler.jsonl
"""

from _common import training_set

from llmrl.data.convert_train import deepscaler

if __name__ == "__main__":
    training_set(__doc__, deepscaler, "agentica-org/DeepScaleR-Preview-Dataset")
