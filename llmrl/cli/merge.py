"""`llmrl merge ADAPTER OUTPUT`: short for `llmrl export ADAPTER OUTPUT --merge`."""

from __future__ import annotations

from collections.abc import Sequence

from llmrl.cli import export


def run(argv: Sequence[str]) -> int:
    """Writes a plain model, which needs neither peft nor the base model."""
    return export.run([*argv, "--merge"])
