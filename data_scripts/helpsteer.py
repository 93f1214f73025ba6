"""HelpSteer3 (Wang et al. 2025, arXiv 2505.11475) or HelpSteer2 (arXiv 2410.01257), as preferences; `strength` is from 1 to 3.

python data_scripts/helpsteer.py --output data/pref_helpsteer3.jsonl
python data_scripts/helpsteer.py --source nvidia/HelpSteer2 --output data/pref_helpsteer2.jsonl

Ties are left out. HelpSteer2 keeps both splits in one file, with a column `split`.
"""

from _common import converted, parser, read, unique, write

from llmrl.data.convert_train import helpsteer

if __name__ == "__main__":
    args = parser(__doc__, "nvidia/HelpSteer3", name="preference").parse_args()
    second = "HelpSteer2" in args.source
    of_hub = {"folder": "preference", "split": "train"} if second else {"name": args.name, "split": args.split}
    rows = (row for row in read(args.source, **of_hub) if row.get("split", args.split) == args.split)
    write(unique(converted(rows, helpsteer)), args)
