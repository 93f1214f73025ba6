"""`llmrl export SOURCE OUTPUT`: a trained model as transformers and vLLM load it: merged, cast, sharded, with its card, and to the hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def run(argv: Sequence[str]) -> int:
    """Writes OUTPUT, and sends it where that is asked for."""
    parser = argparse.ArgumentParser(prog="llmrl export", description=__doc__.partition(": ")[2], allow_abbrev=False)
    parser.add_argument(
        "source", help="a run's output_dir (its final model), a checkpoint, a model's directory or a hub id"
    )
    parser.add_argument("output", type=Path, help="new directory")
    parser.add_argument("--checkpoint", metavar="best|latest|STEP", help="of a run, instead of its final model")
    parser.add_argument("--merge", action="store_true", help="make the adapter a part of its base model's weights")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="default: as it was saved; merged: as its base"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (default %(default)s)"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="owner/name; a new repository is private")
    args = parser.parse_args(argv)

    from llmrl.train.export import check_output, export_model, find_model
    from llmrl.train.hub import check_public, open_repository, upload

    trained = find_model(args.source, args.checkpoint)
    check_output(args.output)
    repo = None
    if args.push_to_hub is not None:
        check_public(trained.model, args.merge)
        repo = open_repository(args.push_to_hub)
    done = export_model(
        trained, args.output, merge=args.merge, dtype=args.dtype, max_shard_size=args.max_shard_size, name=repo
    )
    sizes = " and ".join(f"{n:,} elements in {kind}" for kind, n in done.elements.items())
    print(f"exported: {args.output} ({'adapter of ' + done.base if done.base else 'model'}, {sizes})")
    if done.not_for_vllm:
        print(f"vLLM does not take this adapter ({done.not_for_vllm}): export with --merge for it")
    if repo is not None:
        print(f"pushed: {upload(args.output, repo, f'Model exported by llmrl from {Path(args.source).name}')}")
    return 0
