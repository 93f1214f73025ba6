"""A process that dies, fails or hangs: the others say which one, where each stood, and end with status 2; the checkpoint is whole."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import yaml

from llmrl.train.checkpoint import CheckpointStore, verify
from tests.torture.ranks import Ranks, command

REWARD = (
    "def reward(completions, **kwargs):\n    return [float(sum('a' <= x <= 'z' for x in c)) for c in completions]\n"
)


def recipe(directory, kind, model, **settings):
    """A tiny run of four steps that saves after every one; returns the command's arguments."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = {
        "sft": [{"prompt": f"the answer to {i}", "completion": f" is {i * 7 % 10}"} for i in range(11)],
        "grpo": [{"prompt": text} for text in ("the answer", "is", "because", "three", "times", "four", "twelve")],
    }[kind]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(model), "output_dir": str(directory / "run"), "dataset": str(directory / "rows.jsonl"),
        "batch_size": 4, "max_steps": 4, "save_steps": 1, "save_total_limit": None, "learning_rate": 1e-3,
    }  # fmt: skip
    if kind == "grpo":
        (directory / "reward.py").write_text(REWARD)
        config |= {"num_generations": 4, "max_completion_length": 8}
        config["rewards"] = [{"function": f"{directory / 'reward.py'}:reward"}]
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump({**config, **settings}))
    return [kind, "--config", str(file)]


def assert_lost(ranks, others, culprit, saved, directory):
    """The others ended with status 2, and said which rank was lost, where each stood and where the command goes on."""
    for rank in others:
        assert ranks.codes[rank] == 2, (ranks.codes, ranks.error(rank)[-3000:])
        text = ranks.error(rank)
        assert f"llmrl: error (process {rank}): rank {culprit} " in text, text[-3000:]
        assert f"rank {rank} (this one): step {saved + 1}" in text or "saving" in text, text[-3000:]
        for other in range(len(ranks.codes)):
            assert re.search(rf"\n  rank [\d, ]*\b{other}\b", text)
        if saved:
            assert f"The same command continues from the checkpoint of step {saved}" in text
        assert "Traceback" not in text
    store = CheckpointStore(directory / "run" / "checkpoints")
    newest = store.newest()
    assert newest is not None and newest.name == f"step_{saved:08d}" and not verify(newest)


PLACES = {"an update": r"step 3, update 3, microbatch", "a save": r"step 3, saving$", "sampling": r"step 3, sampling"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, where, processes, lost", [("sft", "an update", 2, 1), ("sft", "a save", 3, 0), ("grpo", "sampling", 2, 1)]
)
def test_a_process_that_is_killed(tiny_model_dir, tmp_path, kind, where, processes, lost):
    argv = recipe(tmp_path, kind, tiny_model_dir)
    with Ranks(command, processes, tmp_path, argv, [(lost, PLACES[where], "kill")]) as ranks:
        ranks.wait(150)
        assert ranks.codes[lost] == -signal.SIGKILL
        others = [r for r in range(processes) if r != lost]
        assert_lost(ranks, others, lost, 2, tmp_path)
        assert all("died (process" in ranks.error(r) for r in others)
    with Ranks(command, processes, tmp_path, argv) as ranks:
        ranks.wait(150)
        assert ranks.codes == [0] * processes, ranks.error(0)


@pytest.mark.slow
@pytest.mark.parametrize("action, lost", [("stop", 0), ("hang", 1)])
def test_a_process_that_hangs(tiny_model_dir, tmp_path, action, lost):
    argv = [*recipe(tmp_path, "sft", tiny_model_dir), "collective_timeout=10"]
    with Ranks(command, 3, tmp_path, argv, [(lost, PLACES["an update"], action)]) as ranks:
        others = [r for r in range(3) if r != lost]
        ranks.wait(150, but=lost if action == "stop" else None)
        assert_lost(ranks, others, lost, 2, tmp_path)
        if action == "stop":
            os.kill(ranks.processes[lost].pid, signal.SIGCONT)  # and one that comes back too late ends too
            ranks.wait(150)
        assert ranks.codes[lost] == 2


@pytest.mark.slow
def test_who_samples_for_long_does_not_outlive_a_dead_one(tiny_model_dir, tmp_path):
    argv = recipe(tmp_path, "grpo", tiny_model_dir)
    faults = [(1, PLACES["sampling"], "kill"), (0, PLACES["sampling"], "hang")]
    with Ranks(command, 2, tmp_path, argv, faults) as ranks:
        ranks.wait(150)
        assert_lost(ranks, [0], 1, 2, tmp_path)
        assert "ended by its watching thread" in ranks.error(0) and "in tests.torture.ranks._hang" in ranks.error(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind, where, lost", [("sft", "an update", 0), ("grpo", "sampling", 1)])
def test_a_process_that_raises(tiny_model_dir, tmp_path, kind, where, lost):
    argv = recipe(tmp_path, kind, tiny_model_dir)
    with Ranks(command, 2, tmp_path, argv, [(lost, PLACES[where], "fail")]) as ranks:
        ranks.wait(150)
        assert ranks.codes[lost] == 1 and "ValueError: row 17 can't be read" in ranks.error(lost)
        assert_lost(ranks, [1 - lost], lost, 2, tmp_path)
        assert "failed with ValueError: row 17 can't be read" in ranks.error(1 - lost)
