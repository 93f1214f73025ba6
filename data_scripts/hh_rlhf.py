"""HH-RLHF (Bai et al. 2022, arXiv 2204.05862), as preferences {id, source, prompt, chosen, rejected} of messages.

python data_scripts/hh_rlhf.py --subset harmless-base --split train --output data/pref_hh_train.jsonl
python data_scripts/hh_rlhf.py --source raw/test.jsonl.gz --subset harmless-base --split test --output data/pref_hh_test.jsonl

The prompt is every turn but the last, which must be the assistant's on both sides. The texts hold harmful requests and rude language.
"""

from _common import converted, parser, read, unique, write

from llmrl.data.convert_train import hh_rlhf

if __name__ == "__main__":
    made = parser(__doc__, "Anthropic/hh-rlhf")
    made.add_argument(
        "--subset", default="harmless-base", help="folder of the hub data set; of a local file its name in ids"
    )
    args = made.parse_args()
    rows = read(args.source, name=args.name, folder=args.subset, split=args.split)
    write(unique(converted(rows, hh_rlhf(args.subset, args.split))), args)
