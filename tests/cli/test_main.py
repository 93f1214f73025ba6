"""The command line as a user meets it: help, errors and exit codes."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from llmrl import __version__
from llmrl.cli import main as cli
from llmrl.cli.recipe import print_keys, read_recipe, show_plain, split_config
from llmrl.config.fields import all_keys
from llmrl.config.load import CONFIGS
from llmrl.config.presets import GRPO_PRESETS, PPO_PRESETS
from llmrl.errors import ConfigError, DataError


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"llmrl {__version__}"


def test_unknown_command(capsys):
    assert cli.main(["grop"]) == 2
    assert "no command 'grop'; did you mean grpo?" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_help_lists_every_key_with_default_and_meaning(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([kind, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for key, field in all_keys(CONFIGS[kind]):
        assert key.rpartition(".")[2] in out
        assert " ".join(field.description.split()) in out
    assert ("default 2e-05" in out) == (kind == "sft")


@pytest.mark.parametrize(("kind", "presets"), [("grpo", GRPO_PRESETS), ("ppo", PPO_PRESETS)])
def test_help_shows_what_each_preset_changes(kind, presets, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    print_keys(kind)
    lines = capsys.readouterr().out.partition("Presets: ")[2].splitlines()[1:]
    shown = {
        line.split()[0]: dict(part.split(": ") for part in line.split(maxsplit=1)[1].strip().split(", "))
        for line in lines
        if line
    }
    assert list(shown) == list(presets)
    for name, values in presets.items():
        written = {axis: show_plain(value) for axis, value in values.items()}
        assert {**shown[kind], **shown[name]} == written


def test_help_is_the_same_for_eval(capsys):
    print_keys("eval")
    assert "threshold" in capsys.readouterr().out


def _command(monkeypatch, run):
    module = types.ModuleType("fake_command")
    module.run = run
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "a test"))


def _raiser(error):
    def run(argv):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("row 3 is bad"), 2, "llmrl: error: row 3 is bad"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(28, "No space left on device", "run/x"),
            2,
            "No space left on device (run/x). What was written is kept",
        ),
        (None, 7, ""),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, text):
    _command(monkeypatch, _raiser(error) if error else lambda argv: 7)
    assert cli.main(["fake"]) == code
    err = capsys.readouterr().err
    assert text in err and "Traceback" not in err


def test_what_llmrl_did_not_expect_keeps_its_traceback(monkeypatch):
    _command(monkeypatch, _raiser(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_an_error_names_its_process(monkeypatch, capsys):
    _command(monkeypatch, _raiser(DataError("x")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["fake"]) == 2
    assert "error (process 1): x" in capsys.readouterr().err


def test_config_is_taken_out_of_the_arguments():
    assert split_config(["a=1", "--config", "r.yaml", "b=2"]) == ("r.yaml", ["a=1", "b=2"])
    assert split_config(["--config=r.yaml"]) == ("r.yaml", [])
    assert split_config(["config=1"]) == (None, ["config=1"])


@pytest.mark.parametrize("argv", [["--config"], ["--config", "--x"], ["--config", "a", "--config", "b"], ["--config="]])
def test_config_given_wrong(argv):
    with pytest.raises(ConfigError, match="--config"):
        split_config(argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sft", "--config", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
        (["sft", "--learning_rate", "1"], "without dashes"),
        (["sft", "model_name_or_path=m", "output_dir=o"], "dataset is empty: sft needs rows to train on"),
        (
            ["grpo", "model_name_or_path=m", "output_dir=o", "dataset=d.jsonl"],
            "rewards is empty: grpo needs a reward function",
        ),
        (["grpo", "use_vllm=true"], "override use_vllm=true: write rollout.engine"),
        (
            ["ppo", "model_name_or_path=m", "output_dir=o", "dataset=d.jsonl"],
            "rewards is empty: ppo needs a reward function or",
        ),
        (["dpo", "model_name_or_path=m", "output_dir=o"], "dataset is empty: dpo needs rows to train on"),
        (["reward", "model_name_or_path=m", "output_dir=o"], "dataset is empty: reward needs rows to train on"),
        (["check", "--config", "r.yaml"], "llmrl check sft --config R"),
    ],
)
def test_a_wrong_recipe_ends_with_one_message(argv, says, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.out == ""


def test_dpo_needs_no_rewards():
    assert read_recipe("dpo", ["model_name_or_path=m", "output_dir=o", "dataset=d.jsonl"]).rewards == []


@pytest.mark.parametrize(
    ("kind", "trainer"),
    [
        ("sft", "llmrl.algorithms.sft.SFTTrainer"),
        ("reward", "llmrl.algorithms.reward_model.RewardTrainer"),
        ("dpo", "llmrl.algorithms.dpo.DPOTrainer"),
        ("ppo", "llmrl.algorithms.ppo.PPOTrainer"),
        ("grpo", "llmrl.algorithms.grpo.GRPOTrainer"),
    ],
)
def test_a_command_trains_by_its_recipe(kind, trainer, monkeypatch):
    seen = []

    class Fake:
        def __init__(self, config):
            self.config = config

        def train(self):
            seen.append(self.config)

    monkeypatch.setattr(trainer, Fake)
    assert (
        cli.main(
            [
                kind,
                "model_name_or_path=m",
                "output_dir=o",
                "dataset=d.jsonl",
                *(["rewards=f"] if kind in ("ppo", "grpo") else []),
            ]
        )
        == 0
    )
    assert [type(config) for config in seen] == [CONFIGS[kind]]


def test_as_a_module_without_torch():
    """What `accelerate launch -m llmrl.cli` starts; a wrong recipe must not cost the import of torch."""
    code = "import sys; from llmrl.cli.main import main; c = {main([k, 'lr=1']) for k in ('reward', 'dpo', 'ppo', 'grpo')}; print(*c, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert out.stdout.split() == ["2", "False"], out.stderr
    out = subprocess.run(
        [sys.executable, "-m", "llmrl.cli", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (out.returncode, out.stdout.strip()) == (0, f"llmrl {__version__}")
