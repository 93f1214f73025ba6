"""`llmrl init-model --output DIR --train-files FILE ...`: a small model from scratch, with a tokenizer trained on the files."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from typing import get_args


def run(argv: Sequence[str]) -> int:
    """Writes the model. Defaults are those of `llmrl.models.init.init_model`."""
    from llmrl.models.init import Family, init_model

    parser = argparse.ArgumentParser(
        prog="llmrl init-model",
        description="A small model with random weights, and a tokenizer trained on your files: to try everything without a hub.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new directory for model and tokenizer")
    parser.add_argument(
        "--train-files",
        required=True,
        nargs="+",
        metavar="FILE",
        help=".jsonl (every string in it) or plain text for the tokenizer",
    )
    parser.add_argument("--fields", nargs="+", metavar="NAME", help="only these fields of .jsonl rows")
    parser.add_argument("--family", choices=get_args(Family), help="architecture")
    for name, meaning in (
        ("vocab-size", "tokens at most"),
        ("hidden-size", "width"),
        ("num-layers", "depth"),
        ("num-heads", "attention heads"),
        ("num-kv-heads", "key and value heads; None: as many"),
        ("intermediate-size", "width of the MLP; None: 8/3 of the width"),
        ("max-position-embeddings", "longest sequence"),
        ("seed", "of the weights"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    parser.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")
    defaults = {
        p.name: p.default for p in inspect.signature(init_model).parameters.values() if p.default is not p.empty
    }
    parser.set_defaults(**{name: value for name, value in defaults.items() if name not in ("train_files", "texts")})
    args = vars(parser.parse_args(argv))
    init_model(args.pop("output"), **args)
    return 0
