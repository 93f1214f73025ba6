"""MATH (Hendrycks et al. 2021, arXiv 2103.03874), the training split of 7,500 problems, as records with subject and level.

python data_scripts/math_train.py --output data/math_train.jsonl --decontaminate data/math500.jsonl

Published solutions whose box is empty are left out. MATH-500 is of the test split, and some training problems are worded almost alike.
"""

from pathlib import Path

from _common import converted, parser, read, unique, write

from llmrl.data.convert_train import math

SUBJECTS = ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus"]  # fmt: skip

if __name__ == "__main__":
    args = parser(__doc__, "EleutherAI/hendrycks_math").parse_args()
    names = [args.name] if args.name is not None or Path(args.source).is_file() else SUBJECTS
    rows = (row for name in names for row in read(args.source, name=name, split=args.split))
    write(unique(converted(rows, math)), args)
