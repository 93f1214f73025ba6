"""`llmrl sft --config RECIPE [key=value ...]`."""

from __future__ import annotations

from collections.abc import Sequence

from llmrl.cli.recipe import print_keys, read_recipe, wants_help


def run(argv: Sequence[str]) -> int:
    """Trains by a recipe. A wrong recipe fails before torch is imported."""
    if wants_help(argv):
        print_keys("sft")
        return 0
    config = read_recipe("sft", argv)
    from llmrl.algorithms.sft import SFTTrainer

    SFTTrainer(config).train()
    return 0
