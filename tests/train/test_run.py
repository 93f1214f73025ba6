"""The run directory: resume to the bit, signals, refusals, records."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from llmrl.config.dpo import DPOConfig
from llmrl.config.grpo import GRPOConfig
from llmrl.config.ppo import PPOConfig
from llmrl.config.reward_model import RewardConfig
from llmrl.config.sft import SFTConfig
from llmrl.data.sampler import Sampler
from llmrl.errors import ConfigError, LLMRLError
from llmrl.train.backend import Backend
from llmrl.train.checkpoint import CheckpointError, verify
from llmrl.train.plot import PANELS, plot_curves, running_mean
from llmrl.train.records import read_metrics
from llmrl.train.resume import HARMLESS, flatten
from llmrl.train.run import Run
from tests.processes import run_processes, run_script
from tests.train.toy import Toy, empty_batch, toy_config, toy_loss

ROWS = 13


class ToyTrainer:
    """Samples rows, takes a step, logs: the loop of every trainer in small."""

    def __init__(self, out, total_steps=10, callbacks=(), **settings):
        self.config = toy_config(out, **{"save_steps": 2, "lr_scheduler_type": "constant", "seed": 3, **settings})
        self.backend = Backend(self.config)
        self.model = Toy(dropout=0.2)
        self.backend.prepare(self.model, total_updates=total_steps)
        self.sampler = Sampler(ROWS, seed=self.config.seed)
        self.run = Run(
            self.config,
            self.backend,
            kind="toy",
            total_steps=total_steps,
            stateful={"sampler": self.sampler},
            gather_model=lambda: self.save_model,
            load_model=lambda path: self.model.load_state_dict(torch.load(path / "weights.pt", weights_only=True)),
            callbacks=callbacks,
            trainer=self,
        )

    def save_model(self, path):
        path.mkdir()
        torch.save(self.model.state_dict(), path / "weights.pt")

    def train(self, body=lambda trainer, step: None):
        with self.run as run:
            for step in run.steps():
                tokens = torch.tensor(self.sampler.take(4))
                mine = tokens[self.backend.rank :: self.backend.world_size]
                batch = (mine, torch.full((len(mine),), 0.25, dtype=torch.float64))
                stats = self.backend.update([batch], toy_loss, empty_batch)
                metrics = {**stats.sums, "grad_norm": stats.grad_norm, "epoch": self.sampler.epoch}
                run.log(step, metrics, tokens=len(tokens))
                run.log_samples(step, [{"prompt": f"p{step}", "completion": "c", "reward": 1.0, "parts": {"a": 1.0}}])
                body(self, step)
        return run.summary


def history(out):
    """The metrics without what the clock decides."""
    clock = ("step_time", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(Path(out) / "metrics.jsonl")]


def weights(path):
    return torch.load(Path(path) / "model" / "weights.pt", weights_only=True)


def assert_same_run(a, b):
    assert history(a) == history(b) and len(history(a)) > 0
    left, right = weights(a), weights(b)
    assert all(torch.equal(left[k], right[k]) for k in left)
    names = sorted(p.name for p in (Path(a) / "samples").iterdir())
    assert names == sorted(p.name for p in (Path(b) / "samples").iterdir())


CHILD = """
import os, signal, sys
from tests.train.test_run import ToyTrainer
ToyTrainer(sys.argv[1]).train(lambda t, step: {action})
"""


def child(out, action):
    script = out.with_suffix(".py")
    script.write_text(CHILD.format(action=action))
    return run_script(script, out)


def test_ten_steps_equal_seven_killed_and_resumed(tmp_path):
    ToyTrainer(tmp_path / "whole").train()
    killed = child(tmp_path / "killed", "os.kill(os.getpid(), signal.SIGKILL) if step == 7 else None")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(history(tmp_path / "killed")) == 7  # one step more than the checkpoint has: it is rewound
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["status"] == "running"
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # as a kill in the middle of a line leaves it
    summary = ToyTrainer(tmp_path / "killed").train()
    assert summary["status"] == "finished" and summary["step"] == 10
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert [row["step"] for row in history(tmp_path / "killed")] == list(range(1, 11))


def test_sigterm_saves_and_exits_143_and_continues(tmp_path):
    ToyTrainer(tmp_path / "whole").train()
    stopped = child(tmp_path / "stopped", "os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None")
    assert stopped.returncode == 143, stopped.stderr
    assert "SIGTERM: saved step 5" in stopped.stdout
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text())["status"] == "stopped"
    assert (tmp_path / "stopped" / "checkpoints" / "latest").read_text() == "step_00000005\n"
    ToyTrainer(tmp_path / "stopped").train()
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_the_exit_code_can_be_chosen_and_the_handler_is_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = ToyTrainer(tmp_path, sigterm_exit_code=85)
    with pytest.raises(SystemExit) as stopped:
        trainer.train(lambda t, step: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.value.code == 85
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_finished_run_leaves(tmp_path):
    summary = ToyTrainer(tmp_path).train()
    found = {p.name for p in tmp_path.iterdir()}
    assert found == {"config.yaml", "metrics.jsonl", "samples", "checkpoints", "summary.json", "model", "curves.png"}
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["status"] == "finished" and summary["seconds"] > 0 and summary["versions"]["torch"]
    last = history(tmp_path)[-1]
    assert last["step"] == 10 and last["num_tokens"] == 40 and last["epoch"] == pytest.approx(40 / ROWS)
    assert set(last) >= {"loss", "grad_norm"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "latest",
        "step_00000008",
        "step_00000010",
    ]
    checkpoint = tmp_path / "checkpoints" / "step_00000010"
    suffixes = {p.suffix for p in checkpoint.rglob("*") if p.is_file() and p.parent == checkpoint}
    assert suffixes == {".json", ".safetensors"}  # nothing that would be unpickled
    assert json.loads((tmp_path / "samples" / "step_00000003.jsonl").read_text())["prompt"] == "p3"
    # Again: nothing to do, nothing changed.
    before = history(tmp_path)
    again = ToyTrainer(tmp_path).train(lambda t, step: pytest.fail("no step is left"))
    assert again["status"] == "finished" and again["step"] == 10 and history(tmp_path) == before


def test_a_finished_run_can_be_made_longer(tmp_path):
    ToyTrainer(tmp_path / "whole").train()
    ToyTrainer(tmp_path / "grown", total_steps=6).train()
    ToyTrainer(tmp_path / "grown", total_steps=10, save_steps=5).train()
    assert_same_run(tmp_path / "whole", tmp_path / "grown")


def test_a_failing_body_is_recorded_and_can_be_continued(tmp_path):
    def fail(trainer, step):
        if step == 5:
            raise ValueError("bad row")

    with pytest.raises(ValueError):
        ToyTrainer(tmp_path / "failed").train(fail)
    summary = json.loads((tmp_path / "failed" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["error"] == "ValueError: bad row" and summary["step"] == 4
    ToyTrainer(tmp_path / "failed").train()
    ToyTrainer(tmp_path / "whole").train()
    assert_same_run(tmp_path / "whole", tmp_path / "failed")


def test_other_recipes_are_not_continued(tmp_path):
    ToyTrainer(tmp_path, total_steps=2).train()
    with pytest.raises(ConfigError) as refused:
        ToyTrainer(tmp_path, learning_rate=0.2, weight_decay=0.5, max_steps=7, save_steps=1)
    text = str(refused.value)
    assert "learning_rate: 0.1 -> 0.2" in text and "weight_decay: 0.0 -> 0.5" in text
    assert "max_steps" not in text and "save_steps" not in text
    trainer = ToyTrainer(tmp_path / "x")
    with pytest.raises(ConfigError, match="is of a toy run, this is a grpo run"):
        Run(
            toy_config(tmp_path, save_steps=2, lr_scheduler_type="constant", seed=3), trainer.backend, kind="grpo",
            total_steps=2, gather_model=lambda: print, load_model=print,
        )  # fmt: skip


def test_never_and_paths(tmp_path):
    ToyTrainer(tmp_path / "a", total_steps=4).train()
    with pytest.raises(ConfigError, match="already holds a run"):
        ToyTrainer(tmp_path / "a", resume="never")
    ToyTrainer(tmp_path / "fresh", total_steps=2, resume="never").train()
    first = tmp_path / "a" / "checkpoints" / "step_00000002"
    with pytest.raises(ConfigError, match="not a whole checkpoint: it has no manifest"):
        ToyTrainer(tmp_path / "a", resume=str(tmp_path))
    # A branch into another directory, and a rewind in the same one, both equal the run that was never stopped.
    ToyTrainer(tmp_path / "branch", resume=str(first)).train()
    assert [row["step"] for row in history(tmp_path / "branch")] == list(range(3, 11))
    with pytest.raises(ConfigError, match="already holds a run"):
        ToyTrainer(tmp_path / "branch", resume=str(first))
    rewound = ToyTrainer(tmp_path / "a", resume=str(first))
    with pytest.raises(KeyboardInterrupt):
        rewound.train(raise_interrupt)
    assert len(history(tmp_path / "a")) == 3
    ToyTrainer(tmp_path / "a").train()  # auto goes on from where the rewind began, not from the later checkpoint
    ToyTrainer(tmp_path / "whole").train()
    assert_same_run(tmp_path / "whole", tmp_path / "a")
    assert all(torch.equal(weights(tmp_path / "whole")[k], v) for k, v in weights(tmp_path / "branch").items())


def raise_interrupt(trainer, step):
    raise KeyboardInterrupt


def test_an_output_dir_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(ConfigError, match="can't be written to"):
            ToyTrainer(place)


def test_only_broken_checkpoints(tmp_path):
    ToyTrainer(tmp_path, total_steps=2).train()
    (tmp_path / "checkpoints" / "step_00000002" / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"step_00000002: state.json is missing"):
        ToyTrainer(tmp_path)


def test_the_model_is_not_written_over_its_source(tmp_path):
    with pytest.raises(ConfigError, match="where this run would write its own model"):
        ToyTrainer(tmp_path, model_name_or_path=str(tmp_path / "model"))


def test_full_disk_stops_with_the_old_checkpoint_whole(tmp_path):
    trainer = ToyTrainer(tmp_path)
    good = trainer.save_model

    def full(path):
        good(path)
        if trainer.run.step == 4:
            raise OSError(28, "No space left on device")

    trainer.run.gather_model = lambda: full
    with pytest.raises(CheckpointError, match="step 4 could not be written"):
        trainer.train()
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    ToyTrainer(tmp_path).train()
    ToyTrainer(tmp_path / "whole").train()
    assert_same_run(tmp_path / "whole", tmp_path)


def test_callbacks(tmp_path):
    class Watch:
        def __init__(self):
            self.calls = []

        def on_train_begin(self, trainer):
            self.calls.append("begin")

        def on_step_end(self, trainer, step, metrics):
            assert metrics["step"] == step and trainer.run.step == step
            self.calls.append(step)
            return step == 3

        def on_save(self, path):
            self.calls.append(path.name)

        def on_train_end(self, trainer):
            self.calls.append("end")

    watch = Watch()
    summary = ToyTrainer(tmp_path, callbacks=[watch, object()]).train()
    assert watch.calls == ["begin", 1, 2, "step_00000002", 3, "step_00000003", "end"]
    assert summary["status"] == "finished" and summary["step"] == 3 and (tmp_path / "model").is_dir()


def test_due(tmp_path):
    run = ToyTrainer(tmp_path, total_steps=7).run
    assert [s for s in range(1, 8) if run.due(3, s)] == [3, 6, 7]
    assert [s for s in range(1, 8) if run.due(None, s)] == [7]


def test_non_finite_metrics_stay_json(tmp_path):
    ToyTrainer(tmp_path, total_steps=1).train(lambda t, step: t.run.log(step, {"loss": float("nan")}))
    rows = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[1]["loss"] is None


def test_harmless_keys_exist():
    known = {
        key for config in (SFTConfig, RewardConfig, DPOConfig, PPOConfig, GRPOConfig) for key in config.model_fields
    }
    settings = flatten(
        GRPOConfig(model_name_or_path="m", output_dir="o", dataset="d.jsonl", rewards="math").model_dump()
    )
    assert known | set(settings) >= HARMLESS


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="names wandb, which is not installed: pip install wandb"):
        ToyTrainer(tmp_path, report_to=["wandb"])


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ToyTrainer(tmp_path, total_steps=2, report_to=["tensorboard"]).train()
    events = list((tmp_path / "trackers").rglob("events.out*"))
    found = {}
    for file in events:
        accumulator = EventAccumulator(str(file)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            found[tag] = [e.value for e in accumulator.Scalars(tag)]
    assert found["loss"] == pytest.approx([row["loss"] for row in history(tmp_path)], rel=1e-5)


PPO_AND_DPO = [
    "reward", "eval_reward", "kl", "value/explained_variance", "completions/mean_length", "rewards/accuracies", "rewards/margins",
    "rewards/chosen", "rewards/rejected", "eval_rewards/margins", "logps/chosen", "logps/rejected", "eval_logps/chosen",
]  # fmt: skip


def test_curves(tmp_path):
    with pytest.raises(LLMRLError, match="no curve to draw"):
        plot_curves(tmp_path)
    rows = [{"step": i, "loss": 1.0 / i, "reward": None if i < 3 else 0.5, "kl": 0.1} for i in range(1, 100)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = plot_curves(tmp_path, tmp_path / "x.png")
    assert out.stat().st_size > 10_000
    assert not set(PPO_AND_DPO) - {name for _, names in PANELS for name in names}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, **dict.fromkeys(PPO_AND_DPO, 1.0)}) + "\n")
    assert plot_curves(tmp_path).stat().st_size > out.stat().st_size
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


def two_process_worker(out):
    def terminate_rank_one(trainer, step):
        if step == 3 and trainer.backend.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)

    trainer = ToyTrainer(out, num_processes=2)
    try:
        trainer.train(terminate_rank_one)
    except SystemExit as stopped:
        assert stopped.code == 143
    else:
        raise AssertionError("both processes stop when one is told to")
    trainer = ToyTrainer(out, num_processes=2)
    assert trainer.run._start.name == "step_00000003"
    draws = trainer.backend.gather_json(torch.rand(1).item())
    assert draws[0] != draws[1]
    trainer.train()
    ToyTrainer(f"{out}-whole", num_processes=2).train()
    # What only rank 0 can find out, every process hears of.
    try:
        ToyTrainer(out, num_processes=2, weight_decay=0.5)
    except LLMRLError as error:
        assert "weight_decay" in str(error)
    else:
        raise AssertionError("another recipe must be refused on every process")


@pytest.mark.slow
def test_two_processes_stop_and_continue_together(tmp_path):
    out = tmp_path / "run"
    run_processes(two_process_worker, 2, str(out))
    assert_same_run(out, f"{out}-whole")
    assert len((out / "samples" / "step_00000001.jsonl").read_text().splitlines()) == 2
    assert (out / "checkpoints" / "step_00000010" / "rng_00001.json").is_file()
    # One process may go on with what two began: the batch is that of the step, not of the process.
    summary = ToyTrainer(out, total_steps=12).train()
    assert summary["step"] == 12 and summary["processes"] == 1


def evaluating(scores):
    """A body that "evaluates" at the steps of `scores`."""

    def body(trainer, step):
        if step in scores:
            trainer.run._metrics["eval_accuracy"] = scores[step]

    return body


def kept(out):
    return sorted(p.name for p in (out / "checkpoints").iterdir() if p.is_dir())


def test_the_best_checkpoint_is_kept(tmp_path):
    scores = {1: 0.2, 2: 0.7, 4: 0.7, 6: float("nan"), 8: 0.5}
    settings = {"metric_for_best_model": "eval_accuracy", "save_steps": 2, "save_total_limit": 1}
    summary = ToyTrainer(tmp_path, **settings).train(evaluating(scores))
    best = tmp_path / "checkpoints" / "step_00000002"  # the first of equals
    assert summary["best"] == {"metric": "eval_accuracy", "value": 0.7, "step": 2, "checkpoint": str(best)}
    assert kept(tmp_path) == ["step_00000002", "step_00000010"] and not verify(best)
    # Less is better of a loss, and where it is said.
    lower = ToyTrainer(tmp_path / "low", **settings, greater_is_better=False).train(evaluating(scores))
    assert lower["best"]["step"] == 1
    assert ToyTrainer(tmp_path / "x", metric_for_best_model="eval_loss").run.greater_is_better is False


def test_the_best_so_far_survives_a_crash(tmp_path):
    settings = {"metric_for_best_model": "eval_accuracy", "save_steps": 3, "save_total_limit": 1}

    def crash(trainer, step):
        evaluating({2: 0.9, 5: 0.4})(trainer, step)
        if step == 7:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        ToyTrainer(tmp_path, **settings).train(crash)
    (tmp_path / "checkpoints" / "best").unlink()  # killed between the save and the pointer
    summary = ToyTrainer(tmp_path, **settings).train(evaluating({8: 0.8}))
    assert summary["best"]["step"] == 2 and kept(tmp_path) == ["step_00000002", "step_00000010"]


def test_a_metric_that_no_evaluation_has_is_said(tmp_path, capsys):
    with pytest.raises(ConfigError, match="begin with eval_, such as eval_reward"):
        toy_config(tmp_path, metric_for_best_model="reward")
    with pytest.raises(ConfigError, match="greater_is_better"):
        toy_config(tmp_path, greater_is_better=True)
    summary = ToyTrainer(tmp_path, metric_for_best_model="eval_acuracy").train(evaluating({2: 0.5}))
    assert "best" not in summary
    assert "metric_for_best_model eval_acuracy is not a number of this evaluation: eval_accuracy" in " ".join(
        capsys.readouterr().out.split()
    )
