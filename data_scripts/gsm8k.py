"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168), train or test, as records: the worked solution is in `meta`.

python data_scripts/gsm8k.py --split train --output data/gsm8k_train.jsonl
python data_scripts/gsm8k.py --split test --output data/gsm8k.jsonl
"""

from _common import benchmark, converted, parser, read, unique, write

from llmrl.data.convert_train import gsm8k

if __name__ == "__main__":
    args = parser(__doc__, "openai/gsm8k", name="main").parse_args()
    if args.split == "test":
        benchmark(__doc__, "gsm8k", args)
    else:
        write(unique(converted(read(args.source, name=args.name, split=args.split), gsm8k)), args)
