"""`llmrl KIND --accelerate FILE`: the environment is accelerate's, word for word; signals, exit codes and errors are the processes'."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llmrl.cli import launch, main, ranks
from llmrl.config.load import RECIPE_DIRS
from llmrl.errors import ConfigError

FILES = RECIPE_DIRS[1] / "accelerate"
MACHINES = {"num_machines": "2", "machine_rank": "1", "main_process_ip": "10.9.8.7", "num_processes": "4"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def gpus(monkeypatch, count):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")


def environment_of_accelerate(monkeypatch, options, arguments):
    """What `accelerate launch` would start its processes with; torchrun and plain processes are caught before they start."""
    import torch.distributed.run
    from accelerate.commands import launch as theirs

    seen = {}
    monkeypatch.setattr(torch.distributed.run, "run", lambda args: seen.update(os.environ, nproc=args.nproc_per_node))
    monkeypatch.setattr(
        theirs, "simple_launcher", lambda args: seen.update(theirs.prepare_simple_launcher_cmd_env(args)[1])
    )
    theirs.launch_command(theirs.launch_command_parser().parse_args([*options, *arguments]))
    return seen


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero2", "zero3", "multi_node"])
def test_the_environment_is_that_of_accelerate_launch(name, monkeypatch):
    gpus(monkeypatch, 2)
    arguments = ["-m", "llmrl.cli", "sft", "--config", "r.yaml"]
    flags = {"single": {}, "multi_node": MACHINES}.get(name, {"num_processes": "2"})
    options = [text for key, value in flags.items() for text in (f"--{key}", value)]
    theirs = environment_of_accelerate(monkeypatch, ["--config_file", str(FILES / f"{name}.yaml"), *options], arguments)
    plan = launch.make_plan({"accelerate": name, **flags}, arguments)
    ours = dict(plan.environment)
    assert plan.ranked == (name != "single")
    if plan.ranked:
        assert int(theirs.pop("nproc")) == plan.local == 2
        assert ours.pop("MASTER_ADDR") == ("10.9.8.7" if name == "multi_node" else "127.0.0.1")
        assert int(ours.pop("MASTER_PORT")) > 1023
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", {}),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("zero3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
    ],
)
def test_shipped_files_say_what_they_are_called(name, expected):
    plan = launch.make_plan({"accelerate": name, "num_processes": "2"}, ["x.py"])
    both = {f"ACCELERATE_USE_{what}" for what in ("FSDP", "DEEPSPEED")}
    assert expected.items() <= plan.environment.items()
    assert both & plan.environment.keys() == both & expected.keys()
    # The recipe decides these: a launch file that sets one would be refused, or be at odds with it.
    assert not {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"} & plan.environment.keys()
    assert plan.environment["ACCELERATE_MIXED_PRECISION"] == "no"


def test_ranks_are_counted_over_machines():
    plan = launch.make_plan({"accelerate": "multi_node", **MACHINES}, ["x.py"])
    got = [[e[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] for e in plan.environments()]
    assert got == [["2", "0", "4", "2"], ["3", "1", "4", "2"]]
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in plan.environments()} == {("10.9.8.7", "29500")}


def test_one_process_a_gpu_unless_said(monkeypatch, capsys):
    assert launch.make_plan({"accelerate": "ddp"}, ["x.py"]).total == 2
    assert "no GPU: 2 processes on the CPU" in capsys.readouterr().err
    gpus(monkeypatch, 4)
    assert launch.make_plan({"accelerate": "ddp"}, ["x.py"]).total == 4
    assert launch.make_plan({"accelerate": "ddp", "num_processes": "3"}, ["x.py"]).local == 3
    assert launch.make_plan({"accelerate": "multi_node", **MACHINES, "num_processes": "8"}, ["x.py"]).local == 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--num_processes", "2"], "goes with --accelerate FILE: ddp, fsdp2"),
        (["--accelerate"], "needs a value"),
        (["--accelerate", "ddp", "--num_processes=two"], "a whole number"),
        (["--accelerate", "ddp", "--accelerate", "ddp"], "stands twice"),
        (["--accelerate", "dpp"], "none that comes with llmrl: ddp, fsdp2, multi_node, single, zero2, zero3"),
        (["--accelerate", "single", "--num-processes", "2"], "for one process"),
        (["--accelerate", "multi_node"], "machines need --machine_rank and --main_process_ip"),
        (["--accelerate", "multi_node", *["--machine_rank", "2", "--main_process_ip", "10.0.0.1"]], "counted from 0"),
        (["--accelerate", "ddp", *["--num_machines", "2", "--machine_rank", "0", "--main_process_ip", "h", "--num_processes", "3"]], "a multiple of 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(argv, text, capsys, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model_name_or_path: m\noutput_dir: o\ndataset: d.jsonl\n")
    assert main.main(["sft", "--config", str(recipe), *argv]) == 2
    assert text in capsys.readouterr().err


def test_a_wrong_recipe_is_refused_before_anything_starts(capsys):
    assert main.main(["sft", "--accelerate", "ddp", "learnin_rate=1"]) == 2
    assert capsys.readouterr().err.count("llmrl: error") == 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"3 here, but 2 GPU\(s\) are visible"):
        launch.make_plan({"accelerate": "ddp", "num_processes": "3"}, ["x.py"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'llmrl\[deepspeed\]'"):
        launch.make_plan({"accelerate": "zero3", "num_processes": "2"}, ["x.py"])


@pytest.mark.parametrize("name", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"])
def test_a_launch_inside_a_launch_is_refused(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "0")
    assert main.main(["grpo", "--accelerate", "ddp"]) == 2
    assert "started by a launcher already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("distributed_type: MEGATRON_LM", "with MEGATRON_LM"),
        ("compute_environment: AMAZON_SAGEMAKER\ndistributed_type: 'NO'", "AMAZON_SAGEMAKER"),
        ("- 1", "no launch file"),
        ("a: [", "can't be read"),
        ("distributed_type: MULTI_GPU\nmixed_precision: bf17", "accelerate refuses it"),
    ],
)
def test_a_file_of_ones_own_is_checked(content, text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=text):
        launch.make_plan({"accelerate": str(path), "num_processes": "2"}, ["x.py"])


def test_a_file_of_ones_own_is_followed(tmp_path):
    path = tmp_path / "mine.yaml"
    wanted = {
        "distributed_type": "MULTI_CPU",
        "num_processes": 3,
        "main_process_port": 23456,
        "mixed_precision": "bf16",
    }
    path.write_text(yaml.safe_dump(wanted))
    plan = launch.make_plan({"accelerate": str(path)}, ["x.py"])
    assert plan.total == 3 and plan.environment["MASTER_PORT"] == "23456"
    assert plan.environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_eval_runs_in_one_process(monkeypatch, capsys):
    assert main.main(["eval", "--model", "m", "--accelerate", "ddp"]) == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["eval", "--model", "m"]) == 2
    assert capsys.readouterr().err.count("llmrl eval runs in one process") == 2


def run_python(code, processes=2, **more):
    environments = [
        {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes), **more} for rank in range(processes)
    ]
    return ranks.run_ranks([sys.executable, "-c", code], environments)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("import os; os._exit(7 * (os.environ['RANK'] == '1'))", 7),
        ("import os; os.kill(os.getpid(), 9 * (os.environ['RANK'] == '0'))", 137),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_failed(code, expected):
    assert run_python(code) == expected


FAIL = """
import os, sys
from llmrl.cli import main
from llmrl.errors import LLMRLError, DataError
def run(argv):
    raise (DataError("row 3 is bad") if os.environ["RANK"] == "1" or {everyone} else LLMRLError("process 1 failed: DataError: row 3 is bad"))
main.COMMANDS["fake"] = ("fake", "")
sys.modules["fake"] = type(sys)("fake"); sys.modules["fake"].run = run
sys.exit(main.main(["fake"]))
"""


@pytest.mark.parametrize(("everyone", "where"), [(True, ""), (False, " (process 1)")])
def test_an_error_is_said_once_and_by_its_cause(everyone, where, capfd):
    assert run_python(FAIL.replace("{everyone}", str(everyone)), processes=3) == 2
    assert capfd.readouterr().err.strip() == f"llmrl: error{where}: row 3 is bad"


def test_processes_that_hang_after_another_has_failed_are_ended(monkeypatch, capfd):
    monkeypatch.setattr(ranks, "GRACE", 0.5)
    monkeypatch.setattr(ranks, "_KILL", 0.5)
    deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN)\nif os.environ['RANK'] == '0': os._exit(3)\ntime.sleep(600)"
    assert run_python(deaf) == 3
    assert "1 process(es) still run after another has failed: SIGKILL" in capfd.readouterr().err


LAUNCHER = """
import json, os, sys
from llmrl.cli.ranks import run_ranks
child = '''
import json, os, signal, sys, time
from pathlib import Path
from llmrl.cli.ranks import follow_launcher
folder = Path(sys.argv[1])
def stop(number, frame):
    time.sleep(float(sys.argv[2]))
    (folder / ("saved" + os.environ["RANK"])).write_text("")
    sys.exit(43)
signal.signal(signal.SIGTERM, stop)
follow_launcher(os.environ)
(folder / ("ready" + os.environ["RANK"])).write_text(str(os.getpid()))
time.sleep(600)
'''
sys.exit(run_ranks([sys.executable, "-c", child, *sys.argv[1:]], [{**os.environ, "RANK": str(r)} for r in range(2)]))
"""


def started(folder: Path, seconds: float) -> tuple[subprocess.Popen[bytes], list[int]]:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(folder), str(seconds)])
    return launcher, [int(until(folder / f"ready{rank}", lambda p: p.read_text())) for rank in range(2)]


def until(path: Path, get):
    for _ in range(3000):
        if path.exists() and (value := get(path)):
            return value
        time.sleep(0.01)
    raise AssertionError(f"{path.name} did not come")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_processes_which_take_their_time(number, tmp_path):
    launcher, _ = started(tmp_path, 0.5)
    launcher.send_signal(number)
    assert launcher.wait(60) == 43
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_a_second_interrupt_ends_it_at_once(tmp_path):
    launcher, pids = started(tmp_path, 600)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.3)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_of_those_that_lost_the_same_process_one_speaks():
    texts = {0: "rank 1 died, so rank 0 can't go on", 1: "no room", 2: "rank 1 died, so rank 2 can't go on"}
    assert ranks.summary(texts, 3) == [
        "llmrl: error (process 0, 2): rank 1 died, so rank 0 can't go on",
        "llmrl: error (process 1): no room",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_processes_end_when_their_launcher_is_killed(tmp_path):
    launcher, _ = started(tmp_path, 0)
    launcher.kill()
    launcher.wait(60)
    for rank in range(2):
        until(tmp_path / f"saved{rank}", lambda path: True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A model of 35,000 parameters, rows, and the losses of five steps in one process."""
    from llmrl.models.init import init_model

    folder = tmp_path_factory.mktemp("launch")
    rows = [{"prompt": f"{a}+{b}=", "completion": f" {a + b}"} for a in range(8) for b in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init_model(
        str(folder / "model"), train_files=[str(folder / "rows.jsonl")], vocab_size=300, hidden_size=32, num_layers=2, num_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    (folder / "sft.yaml").write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(folder / "model"), "output_dir": str(folder / "plain"), "dataset": str(folder / "rows.jsonl"),
                "batch_size": 8, "max_steps": 5, "learning_rate": 1e-3, "mixed_precision": "no",
            }
        )
    )  # fmt: skip
    done = llmrl("sft", "--config", str(folder / "sft.yaml"))
    assert done.returncode == 0, done.stderr
    return folder


def llmrl(*argv):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "llmrl.cli", *argv], capture_output=True, text=True, timeout=500, env=environment
    )


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_every_launch_file_trains_to_the_same_numbers(name, recipe):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    done = llmrl("sft", "--accelerate", name, "--config", str(recipe / "sft.yaml"), f"output_dir={recipe / name}")
    assert done.returncode == 0, done.stderr
    assert losses(recipe / name) == pytest.approx(losses(recipe / "plain"), rel=1e-5)
    assert json.loads((recipe / name / "summary.json").read_text())["processes"] == (1 if name == "single" else 2)
