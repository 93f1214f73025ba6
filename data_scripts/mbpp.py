"""MBPP, sanitized (Austin et al. 2021, arXiv 2108.07732), as records: the official training tasks (601-974), or the benchmark's (11-510).

python data_scripts/mbpp.py --split train --output data/mbpp_train.jsonl
python data_scripts/mbpp.py --split test --output data/mbpp.jsonl
"""

from _common import benchmark, converted, parser, read, unique, write

from llmrl.data.convert_train import mbpp

if __name__ == "__main__":
    args = parser(__doc__, "google-research-datasets/mbpp", name="sanitized").parse_args()
    if args.split == "test":
        benchmark(__doc__, "mbpp", args)
    else:
        write(unique(converted(read(args.source, name=args.name, split=args.split), mbpp)), args)
