"""IF multi-constraints, up to five a prompt (Pyatkin et al. 2025, arXiv 2507.02833), as records for the verifier `instructions`.

python data_scripts/if_multi_constraints.py --output data/if_multi_constraints.jsonl

Rows with an instruction that the verifier does not know (it knows IFEval's 25) are left out and counted.
"""

from _common import converted, parser, read, unique, write

from llmrl.data.convert_train import if_multi_constraints
from llmrl.rewards.ifeval_checks import CHECKS


def usable(row: dict) -> str | None:
    """Why the row's instructions can't be checked, or None."""
    unknown = [name for name in row["meta"]["instruction_id_list"] if name not in CHECKS]
    return f"instruction {unknown[0]} is not known" if unknown else None


if __name__ == "__main__":
    args = parser(__doc__, "allenai/IF_multi_constraints_upto5").parse_args()
    write(unique(converted(read(args.source, name=args.name, split=args.split), if_multi_constraints, usable)), args)
