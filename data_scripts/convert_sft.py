"""Conversations in Alpaca's form (instruction, input, output), ShareGPT's (conversations of from and value) or as `messages`, as records.

python data_scripts/convert_sft.py --source tatsu-lab/alpaca --prefix alpaca --output data/sft_alpaca.jsonl
"""

from functools import partial

from _common import converted, parser, read, unique, write

from llmrl.data.convert_train import conversation

if __name__ == "__main__":
    made = parser(__doc__, "tatsu-lab/alpaca")
    made.add_argument(
        "--prefix", default="sft", help="before the ids, and the name of the source (default: %(default)s)"
    )
    args = made.parse_args()
    to_record = partial(conversation, prefix=args.prefix, source=args.prefix)
    write(unique(converted(read(args.source, name=args.name, split=args.split), to_record)), args)
