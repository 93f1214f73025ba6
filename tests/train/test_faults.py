"""Full disks, NaN gradients and SIGTERM in a run of two processes: what each one says, what is left, and that the command goes on."""

from __future__ import annotations

import os
import subprocess

import pytest
from safetensors.torch import load_file

from llmrl.train.checkpoint import CheckpointStore, verify
from tests.torture.ranks import Ranks, command
from tests.train.test_lost_processes import recipe


def newest(directory):
    """The step of the checkpoint that the run in `directory` continues from; nothing may be left of one that was not finished."""
    store = CheckpointStore(directory / "run" / "checkpoints")
    assert not [p for p in store.root.iterdir() if p.name.startswith((".tmp", ".old"))]
    assert not any(map(verify, store.all()))
    return int(store.newest().name.removeprefix("step_"))


def weights(directory, part="run/model"):
    return load_file(directory / part / "model.safetensors")


def goes_on_as_unbroken(model, directory, argv):
    """The same command finishes the run, with the weights of one that was never stopped."""
    with Ranks(command, 2, directory / "output", argv) as ranks:
        ranks.wait(150)
        assert ranks.codes == [0, 0], ranks.error(0)
    whole = directory / "whole"
    with Ranks(command, 2, directory / "output", recipe(whole, argv[0], model)) as ranks:
        ranks.wait(150)
        assert ranks.codes == [0, 0], ranks.error(0)
    expected, found = weights(whole), weights(directory)
    assert all(expected[name].equal(value) for name, value in found.items()) and expected.keys() == found.keys()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MB; needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk of its own to fill: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step 3, saving$", "step 3, update 3$"])
def test_a_full_disk(tiny_model_dir, small_disk, tmp_path, monkeypatch, where):
    monkeypatch.setenv("BALLAST", str(small_disk / "ballast"))
    argv = recipe(small_disk, "sft", tiny_model_dir)
    with Ranks(command, 2, tmp_path / "output", argv, [(0, where, "fill disk")]) as ranks:
        ranks.wait(150)
        assert ranks.codes == [2, 2], ranks.error(0)
        errors = [ranks.error(rank) for rank in range(2)]
    assert all(
        "No space left on device" in text and "llmrl: error" in text and "Traceback" not in text for text in errors
    ), errors
    assert newest(small_disk) == 2
    (small_disk / "ballast").unlink()
    goes_on_as_unbroken(tiny_model_dir, small_disk, argv)


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process(tiny_model_dir, tmp_path):
    """Where the optimizer is sharded every process writes its part."""
    argv = recipe(tmp_path, "sft", tiny_model_dir)
    with Ranks(sharded_command, 2, tmp_path / "output", argv, [(1, "step 3, saving$", "no large files")]) as ranks:
        ranks.wait(150)
        assert ranks.codes == [2, 2], ranks.error(0)
        assert "checkpoint of step 3 could not be written" in ranks.error(1) and "File too large" in ranks.error(1)
        assert "process 1 failed: CheckpointError" in ranks.error(0)
    assert newest(tmp_path) == 2
    with Ranks(sharded_command, 2, tmp_path / "output", argv) as ranks:
        ranks.wait(150)
        assert ranks.codes == [0, 0], ranks.error(0)


def sharded_command(argv, faults=()):
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    command(argv, list(faults))


@pytest.mark.slow
def test_nan_gradients_on_one_process_stop_all(tiny_model_dir, tmp_path):
    argv = [*recipe(tmp_path, "sft", tiny_model_dir), "max_nonfinite_steps=1"]
    with Ranks(command, 2, tmp_path / "output", argv, [(1, "step 3, update 3$", "poison")]) as ranks:
        ranks.wait(150)
        assert ranks.codes == [2, 2], ranks.error(0)
        for rank in range(2):
            assert "update 4: the loss or the gradient is not finite" in ranks.error(rank)
    assert newest(tmp_path) == 3  # the first bad update was skipped, on both
    before, after = (weights(tmp_path, f"run/checkpoints/step_0000000{step}/model") for step in (2, 3))
    assert all(before[name].equal(value) for name, value in after.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, where, ranks_told, saved",
    [
        ("grpo", "step 3, sampling", [1], 3),
        ("sft", "step 2, saving$", [0, 1], 3),
        ("sft", "step 2, update 2$", [0, 1], 2),
    ],
)
def test_sigterm(tiny_model_dir, tmp_path, kind, where, ranks_told, saved):
    argv = recipe(tmp_path, kind, tiny_model_dir)
    with Ranks(command, 2, tmp_path / "output", argv, [(rank, where, "terminate") for rank in ranks_told]) as ranks:
        ranks.wait(150)
        assert ranks.codes == [143, 143], ranks.error(0)
        assert f"SIGTERM: saved step {saved}" in ranks.output(0)
    assert newest(tmp_path) == saved
    goes_on_as_unbroken(tiny_model_dir, tmp_path, argv)


@pytest.mark.slow
def test_sigterm_while_the_final_model_is_written(tiny_model_dir, tmp_path):
    argv = recipe(tmp_path, "sft", tiny_model_dir)
    with Ranks(command, 2, tmp_path / "output", argv, [(0, "writing the model$", "terminate")]) as ranks:
        ranks.wait(150)
        assert ranks.codes == [0, 0], ranks.error(0)
    assert weights(tmp_path)
