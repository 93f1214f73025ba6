"""The Slurm scripts, run with stand-ins for Slurm's commands that write down what they are asked."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from llmrl.cli.launch import split_flags

SCRIPTS = Path(__file__).resolve().parents[1] / "recipes" / "slurm"


def run(tmp_path, nodes, *argv, script="grpo-multinode.sbatch", **env):
    commands = tmp_path / "bin"
    commands.mkdir()
    stubs = {
        "scontrol": "for n in $NODES; do echo $n; done",
        # What the node itself would run is run here, so that its quoting is tested as well.
        "srun": 'echo "srun $*" >> "$LOG"; while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=1 "$@"',
        # Training waits for its servers, as the real one does: the job ends them when it ends. Two of them run on this "node".
        "llmrl": """
            if [[ $1 == serve ]]; then echo "gpus=$CUDA_VISIBLE_DEVICES $*" >> "$LOG"; exit; fi
            for arg; do echo "argument $arg" >> "$LOG"; done
            [[ $* == *rollout.urls* ]] || exit 0
            for _ in {1..300}; do (( $(grep -c ^gpus= "$LOG") == 2 )) && exit; sleep 0.1; done""",
        "hostname": "echo node",
    }
    for name, body in stubs.items():
        path = commands / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    log = tmp_path / "log"
    environment = {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "NODES": nodes, "LOG": str(log), "SLURM_JOB_NODELIST": "x",
        "SLURM_JOB_ID": "7", **env,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SCRIPTS / script), *argv],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, log.read_text().splitlines() if log.exists() else []


def arguments(log):
    return [line.removeprefix("argument ") for line in log if line.startswith("argument ")]


def launched(argv):
    """(command, launch file, what else the launcher was told), read as `llmrl` itself reads it; the stand-in node is number 1."""
    flags, rest = split_flags(argv)
    assert flags.pop("machine_rank") == "1" and f"num_processes={flags['num_processes']}" in rest
    return rest[0], flags.pop("accelerate"), flags


def test_nodes_are_shared_out_and_the_token_is_on_no_command_line(tmp_path):
    done, log = run(tmp_path, "a b c", "r.yaml", "some/model", GPUS="4", TENSOR_PARALLEL="2", TRAIN_NODES="1")
    assert done.returncode == 0, done.stderr
    servers = [line for line in log if line.startswith("gpus=")]
    assert sorted(line.split()[0] for line in servers) == ["gpus=0,1", "gpus=2,3"]
    assert all("--host 0.0.0.0" in line and "--tensor-parallel-size 2" in line for line in servers)
    training = arguments(log)
    assert "rollout.urls=[http://b:8000,http://b:8001,http://c:8000,http://c:8001]" in training
    assert launched(training) == (
        "grpo",
        "multi_node",
        {"num_machines": "1", "num_processes": "4", "main_process_ip": "a"},
    )
    token = tmp_path / "runs" / "slurm-7" / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text().strip()) > 20
    assert token.read_text().strip() not in "\n".join(log)


def test_a_job_without_nodes_for_servers_is_refused(tmp_path):
    done, log = run(tmp_path, "a b", "r.yaml", "some/model", TRAIN_NODES="2")
    assert done.returncode == 1 and "TRAIN_NODES" in done.stderr and not log


def test_any_trainer_on_all_nodes(tmp_path):
    argv = ("sft", "my recipe.yaml", "learning_rate=1e-5", "system_prompt=be brief; $HOME")
    done, log = run(tmp_path, "a b", *argv, script="train.sbatch", GPUS="4", ACCELERATE="ddp")
    assert done.returncode == 0, done.stderr
    training = arguments(log)
    assert launched(training) == ("sft", "ddp", {"num_machines": "2", "num_processes": "8", "main_process_ip": "a"})
    assert training[training.index("--config") + 1] == "my recipe.yaml"
    assert training[-2:] == list(argv[2:])  # word for word
