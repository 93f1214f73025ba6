"""`llmrl KIND --accelerate FILE ...`: starts the processes of a run from one of accelerate's launch files.

The environment is the one that `accelerate launch --config_file FILE` gives, taken from accelerate itself; the processes are
started here (`cli/ranks.py`), because accelerate starts a single one where there is no GPU, and because torchrun kills after 30
seconds what is still saving a checkpoint. A cluster's own launcher (`accelerate launch`, `torchrun`, `srun`) serves as well.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmrl.cli.recipe import read_recipe, wants_help
from llmrl.config.load import CONFIGS, RECIPE_DIRS
from llmrl.errors import ConfigError

USAGE = "--accelerate FILE [--num_processes N] [--num_machines M --machine_rank R --main_process_ip A [--main_process_port P]]"

_NUMBERS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
_FLAGS = ("accelerate", "main_process_ip", *_NUMBERS)
_KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")
_CPU_PROCESSES = 2
_PORT = 29500  # where the machines of a run meet, unless another is named: torchrun's and accelerate's default


@dataclass(frozen=True)
class Plan:
    """This machine's part of a run: `local` processes whose ranks start at `first`, of `total` over all machines.

    `environment` is the whole environment of a process but for its rank; a process that is not `ranked` is a plain one.
    """

    local: int
    first: int
    total: int
    environment: Mapping[str, str]
    ranked: bool = True

    def environments(self) -> Iterator[dict[str, str]]:
        """The environment of each process here, by rank, as torchrun would give it."""
        if not self.ranked:
            yield dict(self.environment)
            return
        for local in range(self.local):
            yield {
                **self.environment,
                "RANK": str(self.first + local),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(self.total),
                "LOCAL_WORLD_SIZE": str(self.local),
            }


def asked_for(argv: Sequence[str]) -> bool:
    """Whether a flag of the launcher is among the arguments, which do not ask for help."""
    return not wants_help(argv) and any(_flag(arg) in _FLAGS for arg in argv)


def run(command: str, argv: Sequence[str]) -> int:
    """Starts `llmrl command argv...` in as many processes as asked for; returns their exit code when all have ended.

    Raises ConfigError, before anything is started, for what can't work: an unknown file, a package that is missing, too few GPUs, a
    wrong recipe.
    """
    flags, rest = split_flags(argv)
    if "accelerate" not in flags:
        raise ConfigError(f"--{next(iter(flags))} goes with --accelerate FILE: {', '.join(shipped())}, or a path")
    refuse_nested(os.environ)
    if command in CONFIGS:
        read_recipe(command, rest)  # what is wrong with it is said once, not by every process
    arguments = ["-m", "llmrl.cli", command, *rest]
    plan = make_plan(flags, arguments)
    from llmrl.cli.ranks import run_ranks

    return run_ranks([sys.executable, *arguments], list(plan.environments()))


def split_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The launcher's flags by name, and the arguments that are the command's. Raises ConfigError for one without a value or twice."""
    flags: dict[str, str] = {}
    rest = []
    args = iter(argv)
    for arg in args:
        name = _flag(arg)
        if name not in _FLAGS:
            rest.append(arg)
            continue
        _, equals, value = arg.partition("=")
        given = value if equals else next(args, "")
        if not given or given.startswith("-"):
            raise ConfigError(f"--{name} needs a value: {USAGE}")
        if name in _NUMBERS and not given.isdigit():
            raise ConfigError(f"--{name} {given}: a whole number, 0 or more")
        if name in flags:
            raise ConfigError(f"--{name} stands twice")
        flags[name] = given
    return flags, rest


def shipped() -> list[str]:
    """The names of the launch files that come with llmrl."""
    return sorted({path.stem for folder in RECIPE_DIRS for path in (folder / "accelerate").glob("*.yaml")})


def find_file(name: str) -> Path:
    """A shipped file by its name (`ddp`), or a file by its path. Raises ConfigError for neither."""
    for path in (*(folder / "accelerate" / f"{name}.yaml" for folder in RECIPE_DIRS), Path(name)):
        if path.is_file():
            return path.resolve()
    raise ConfigError(f"--accelerate {name}: no such file, and none that comes with llmrl: {', '.join(shipped())}")


def refuse_nested(env: Mapping[str, str]) -> None:
    """Raises ConfigError inside a process that a launcher has started: each would start a whole run."""
    for name in (
        "LOCAL_RANK",
        "ACCELERATE_MIXED_PRECISION",
    ):  # RANK alone may be a machine's, on clusters that number them
        if name in env:
            raise ConfigError(
                f"--accelerate starts processes, but this one was started by a launcher already ({name}={env[name]} is set). Start "
                "`llmrl KIND --accelerate FILE ...` itself, once a machine; or leave --accelerate to torchrun or accelerate launch"
            )


def make_plan(flags: Mapping[str, str], arguments: Sequence[str]) -> Plan:
    """What accelerate makes of the file and the flags. `arguments` are those of Python, in every process."""
    path = find_file(flags["accelerate"])
    kind, wanted = _read(path)
    machines = int(flags.get("num_machines") or wanted.get("num_machines") or 1)
    rank = _machine_rank(flags, wanted, machines)
    total = _count(flags, wanted, kind, machines)
    address = flags.get("main_process_ip") or wanted.get("main_process_ip") or "127.0.0.1"
    # Port 0: one that is free. Machines have to agree on one beforehand.
    port = flags.get("main_process_port") or wanted.get("main_process_port") or (_PORT if machines > 1 else 0)
    given = {
        "config_file": path,
        "num_processes": total,
        "num_machines": machines,
        "machine_rank": rank,
        "main_process_ip": address,
        "main_process_port": port,
    }
    environment, port = _accelerate(given, arguments)
    if kind != "NO":
        environment |= {"MASTER_ADDR": str(address), "MASTER_PORT": str(port)}
    local = total // machines
    return Plan(local, rank * local, total, environment, ranked=kind != "NO")


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """(the file's distributed type, the file). Raises ConfigError for types that llmrl does not run and packages that are missing."""
    try:
        wanted = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} can't be read as a launch file: {error}") from error
    kind = wanted.get("distributed_type") if isinstance(wanted, dict) else None
    kind = "NO" if kind is False else kind  # YAML 1.1 reads a bare NO as false
    if kind not in _KINDS or wanted.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise ConfigError(
            f"{path}: llmrl runs launch files for LOCAL_MACHINE with distributed_type {', '.join(_KINDS)}; this one has "
            f"{wanted.get('compute_environment', 'LOCAL_MACHINE')} with {kind}"
            if isinstance(wanted, dict)
            else f"{path} is no launch file of accelerate: those are mappings, with distributed_type"
        )
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{path} asks for DeepSpeed, which is not installed: pip install 'llmrl[deepspeed]'")
    return kind, wanted


def _gpus(ids: object) -> int:
    """GPUs of this machine that the file lets the processes see."""
    import torch

    return torch.cuda.device_count() if ids in (None, "all") else len(str(ids).split(","))


def _count(flags: Mapping[str, str], wanted: Mapping[str, Any], kind: str, machines: int) -> int:
    """Processes over all machines: the flag's, the file's, or one a GPU. Raises ConfigError where they can't be."""
    gpus = _gpus(wanted.get("gpu_ids"))
    given = int(flags.get("num_processes") or wanted.get("num_processes") or 0)
    total = given or (1 if kind == "NO" else machines * (gpus or _CPU_PROCESSES))
    if kind == "NO" and total > 1:
        raise ConfigError(
            f"--num_processes {total}: this launch file is for one process; take ddp, fsdp2, zero2 or zero3"
        )
    if total % machines:
        raise ConfigError(
            f"--num_processes {total} counts the processes of all {machines} machines: a multiple of {machines}"
        )
    if gpus and total // machines > gpus:
        raise ConfigError(
            f"{total} processes on {machines} machine(s) are {total // machines} here, but {gpus} GPU(s) are visible: one process a GPU. "
            f"Take --num_processes {machines * gpus}, or let more be seen (CUDA_VISIBLE_DEVICES)"
        )
    if not gpus and not given and kind != "NO":
        print(
            f"llmrl: no GPU: {total} processes on the CPU, over gloo (--num_processes N for another number)",
            file=sys.stderr,
        )
    return total


def _machine_rank(flags: Mapping[str, str], wanted: Mapping[str, Any], machines: int) -> int:
    """Which machine this is. Raises ConfigError where several machines could not find together."""
    rank = int(flags.get("machine_rank") or 0)
    missing = [f"--{name}" for name in ("machine_rank", "main_process_ip") if not flags.get(name, wanted.get(name))]
    if machines > 1 and missing:
        raise ConfigError(
            f"{machines} machines need {' and '.join(missing)}: run the same command on every machine with --machine_rank 0, 1, ... and "
            "--main_process_ip, the address of machine 0 as the others see it; --num_processes counts all of them"
        )
    if rank >= machines:
        raise ConfigError(f"--machine_rank {rank} of {machines} machine(s): they are counted from 0")
    return rank


def _accelerate(given: Mapping[str, object], arguments: Sequence[str]) -> tuple[dict[str, str], int | None]:
    """The environment that `accelerate launch` gives to processes, and the port where they meet.

    Follows `launch_command` of accelerate.commands.launch, up to where that starts something.
    """
    from accelerate.commands import launch
    from accelerate.utils import check_cuda_p2p_ib_support
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    try:
        args = launch.launch_command_parser().parse_args([*options, *arguments])
        args, defaults, has_precision = launch._validate_launch_command(args)
        if args.use_deepspeed:
            args.deepspeed_multinode_launcher = "standard"  # no ssh from here: each machine runs its own command
            fields = [*defaults.deepspeed_config, *(["mixed_precision"] if has_precision else [])]
            args.deepspeed_fields_from_accelerate_config = ",".join(fields)
            environment = prepare_deepspeed_cmd_env(args)[1]
        elif args.use_fsdp or args.multi_gpu or args.num_processes > 1:
            environment = prepare_multi_gpu_env(args)
        else:
            environment = prepare_simple_launcher_cmd_env(args)[1]
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{given['config_file']}: accelerate refuses it: {error}") from error
    if args.num_processes > 1 and not check_cuda_p2p_ib_support():
        environment = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1", **environment}
    return environment, args.main_process_port


def _flag(arg: str) -> str:
    """`--num-processes=4` and `--num_processes` -> `num_processes`; "" for what is no flag."""
    return arg.partition("=")[0][2:].replace("-", "_") if arg.startswith("--") else ""
