"""What a machine without a GPU can't show: `make gpu-check`, or `python benchmarks/gpu_check.py [CHECK ...]` on a CUDA machine.

Packed attention and the chunked head against plain references; one update computed in ways that must not matter; the same recipe under
other cuts, precisions and shardings; speed, utilisation and memory of the trainers for two shapes, TRL beside them; every trainer
once. Needs torch, transformers and numpy, no installation and no hub; checks that need more say what is missing and are skipped.
Prints a JSON line a result, with "ok" where there is a bound. Exit code: 0 all held, 1 a check failed, 2 no CUDA device or a package missing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installation

NEEDED = ("torch", "transformers", "numpy")
MODULES = ("references", "equalities", "bare", "runs", "speed")
"""Of the folder gpu, in the order in which their checks run: what is right before what is fast."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checks", nargs="*", help="names of checks; default: all")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # on the CPU, see gpu/common.py
    args = parser.parse_args()
    if lost := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return refuse(f"{', '.join(lost)} not installed; it needs {', '.join(NEEDED)}")
    if args.rehearse:
        os.environ["GPU_CHECK_REHEARSAL"] = "1"
    import torch
    import transformers

    if not (args.rehearse or torch.cuda.is_available()):
        return refuse("torch sees no CUDA device here, and every check needs one; nothing was checked")
    for module in MODULES:
        importlib.import_module(f"gpu.{module}")
    from gpu.common import CHECKS, FAILED, emit

    wanted = args.checks or list(CHECKS)
    if unknown := set(wanted) - set(CHECKS):
        return refuse(f"no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    device = "cpu" if args.rehearse else torch.cuda.get_device_name()
    emit("machine", device=device, torch=torch.__version__, transformers=transformers.__version__)
    for name in wanted:
        began = time.monotonic()
        torch.manual_seed(0)
        try:
            CHECKS[name]()
        except Exception as error:
            traceback.print_exc()
            emit(name, False, error=f"{type(error).__name__}: {error}"[:500])
        emit(f"{name}/seconds", seconds=time.monotonic() - began)
        gc.collect()  # a trainer is a cycle, and its tensors go with it
        if not args.rehearse:
            torch.cuda.empty_cache()
    print(json.dumps({"failed": FAILED}), flush=True)
    return 1 if FAILED else 0


def refuse(reason: str) -> int:
    print(f"gpu-check: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
