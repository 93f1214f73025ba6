"""The `llmrl` command: finds the command's module, runs it, and turns errors into one message and an exit code.

Exit codes: 0 done, 2 an error that llmrl explains, 130 interrupted; whatever is not an `LLMRLError` keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from llmrl import __version__
from llmrl.cli.ranks import explain, follow_launcher
from llmrl.errors import ConfigError, LLMRLError

# command -> (module with run(argv) -> exit code, what it does); modules are imported when they are run
COMMANDS = {
    "sft": ("llmrl.cli.sft", "supervised fine-tuning"),
    "reward": ("llmrl.cli.reward", "a reward model, from preferences or from right and wrong answers"),
    "dpo": ("llmrl.cli.dpo", "preference optimisation: DPO and its relatives, from pairs or online"),
    "ppo": ("llmrl.cli.ppo", "reinforcement learning from rewards, with a critic: PPO"),
    "grpo": ("llmrl.cli.grpo", "the same without a critic: GRPO, Dr. GRPO, DAPO, RLOO, REINFORCE++"),
    "eval": ("llmrl.cli.eval", "accuracy of a model on benchmarks, or on a file of problems"),
    "compare": ("llmrl.cli.compare", "two results of one benchmark, problem by problem"),
    "report": ("llmrl.cli.report", "one HTML page about runs and results: curves, numbers, samples"),
    "doctor": (
        "llmrl.cli.doctor",
        "a run that must change nothing: does the engine sample with the trainer's weights?",
    ),
    "check": ("llmrl.cli.check", "what a recipe would do: rows, masks, lengths, batches, rewards, memory"),
    "plan": ("llmrl.cli.scale", "what a recipe needs on a cluster, on paper: memory, sharding, time of a step"),
    "try-reward": ("llmrl.cli.try_reward", "a recipe's rewards on answers that you write"),
    "audit-verifier": ("llmrl.cli.audit", "a verifier against labelled answers: agreement, precision, recall"),
    "judge-check": ("llmrl.cli.judge_check", "a rubric's judge against planted attacks and known answers"),
    "serve": ("llmrl.cli.serve", "a vLLM server that training samples from; --check looks at one that runs"),
    "init-model": ("llmrl.cli.init_model", "a small model from scratch, with a tokenizer trained on your files"),
    "export": ("llmrl.cli.export", "a trained model out: merged, cast, sharded, with its card, and to the hub"),
    "merge": ("llmrl.cli.merge", "a LoRA adapter merged into its base model: short for export --merge"),
    "quickstart": ("llmrl.cli.quickstart", "model, SFT, GRPO and evaluation in one go, without a network"),
}

TOGETHER = ("sft", "reward", "dpo", "ppo", "grpo", "doctor")
"""The commands that several processes run together: they take `--accelerate`."""


def usage() -> str:
    """The text of `llmrl --help`."""
    commands = "\n".join(f"  {name:<16}{text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: llmrl COMMAND ...

{commands}

  llmrl grpo --config recipes/x.yaml learning_rate=2e-6 rewards.0.weight=0.5
  llmrl grpo --accelerate fsdp2 --num_processes 8 --config recipes/x.yaml    several processes, as a launch file of accelerate says
  torchrun --nproc_per_node 8 -m llmrl.cli grpo --config recipes/x.yaml     the same from another launcher (data-parallel)

`llmrl COMMAND --help` says more; for a trainer (`llmrl grpo --help`) it lists every key of a recipe.
`llmrl --version` prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's) and returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    follow_launcher(os.environ)
    _quieten()
    try:
        return _run(args)
    except LLMRLError as error:
        explain(str(error), os.environ)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        text = f"nothing more can be written: {error.strerror}{where}. What was written is kept: make room, and run the same command again"
        explain(text, os.environ)
        return 2
    except KeyboardInterrupt:
        print("llmrl: interrupted", file=sys.stderr)
        return 130


def _quieten() -> None:
    """Drops two messages by which libraries tell each other what a user can do nothing about.

    Saving a model imports DeepSpeed where it is installed, and that warns where there is no GPU; its ZeRO calls functions of torch by
    names that are going out of use, each of which warns in every step.
    """
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"llmrl {__version__}")
        return 0
    command, *rest = args
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"no command {command!r}; {hint}")
    if command in TOGETHER:
        from llmrl.cli import launch

        if launch.asked_for(rest):
            return launch.run(command, rest)
    return int(importlib.import_module(COMMANDS[command][0]).run(rest))
