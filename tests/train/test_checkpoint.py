"""Killed at every file operation of a save, out of space, tampered with: a whole checkpoint is always found."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest

from llmrl.train.checkpoint import CheckpointError, CheckpointStore, step_of, verify, written


def write(text):
    def writer(directory):
        (directory / "model").mkdir()
        (directory / "model" / "weights.bin").write_text(text * 100)
        (directory / "state.json").write_text(json.dumps({"text": text}))

    return writer


def save(store, step, writer):
    """As a run of one process saves."""
    directory = store.begin(step)
    try:
        with store.explained(step):
            writer(directory)
            files = written(directory)
        return store.finish(step, files)
    except BaseException:
        store.abandon(step)
        raise


def text_of(path):
    return json.loads((path / "state.json").read_text())["text"]


def test_saves_points_and_prunes(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest() is None and store.all() == []
    for step in (5, 10, 15):
        path = save(store, step, write(str(step)))
        assert store.newest() == path == tmp_path / "checkpoints" / f"step_{step:08d}"
        assert verify(path) == ""
    assert [step_of(p) for p in store.all()] == [10, 15]
    assert sorted(p.name for p in store.root.iterdir()) == ["latest", "step_00000010", "step_00000015"]
    keep_all = CheckpointStore(tmp_path / "all", keep=None)
    for step in (1, 2, 3):
        save(keep_all, step, write("x"))
    assert len(keep_all.all()) == 3


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "model" / "weights.bin").write_text("short"), "bytes, not"),
        (lambda p: (p / "state.json").write_text((p / "state.json").read_text().replace("new", "bad")), "was changed"),
        (lambda p: (p / "manifest.json").unlink(), "never finished"),
        (lambda p: (p / "manifest.json").write_text("{"), "can't be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "can't be read"),
    ],
)
def test_walks_back_from_a_damaged_one(tmp_path, damage, why):
    store = CheckpointStore(tmp_path, keep=None)
    save(store, 1, write("old"))
    new = save(store, 2, write("new"))
    damage(new)
    assert why in verify(new)
    assert text_of(store.newest()) == "old"
    save(store, 2, write("again"))  # the damaged one does not stop a new save of its step
    assert text_of(store.newest()) == "again"


def test_the_pointer_wins_over_a_later_step_and_the_other_branch_is_pruned(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        save(store, step, write(str(step)))
    store.point_to(store.path(10))  # resumed from the earlier one
    assert step_of(store.newest()) == 10
    save(store, 15, write("15"))
    assert [step_of(p) for p in store.all()] == [10, 15]
    (tmp_path / "latest").write_text("../../etc")
    assert step_of(store.newest()) == 15


def test_names():
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        step_of(CheckpointStore("x").root / "checkpoint-10")


def failing_fsync(k, error):
    count, real = iter(range(10**6)), os.fsync

    def fsync(descriptor):
        if next(count) == k:
            raise OSError(error, os.strerror(error))
        real(descriptor)

    return fsync


@pytest.mark.parametrize("k", range(6))
def test_full_disk_while_flushing(tmp_path, monkeypatch, k):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1, write("old"))
    monkeypatch.setattr(os, "fsync", failing_fsync(k, errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*No space left.*Make room"):
        save(store, 2, write("new"))
    monkeypatch.undo()
    assert text_of(store.newest()) in ("old", "new") if k >= 5 else text_of(store.newest()) == "old"
    assert not list(tmp_path.glob(".tmp_step*"))
    save(store, 3, write("later"))
    assert text_of(store.newest()) == "later"


def test_full_disk_while_writing(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1, write("old"))

    def full(directory):
        (directory / "part").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(CheckpointError, match="No space left"):
        save(store, 2, full)
    with pytest.raises(ZeroDivisionError):  # a bug is not dressed up as a full disk
        save(store, 2, lambda directory: 1 / 0)
    assert text_of(store.newest()) == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_every_file_is_flushed_before_the_rename(tmp_path, monkeypatch):
    flushed, at_rename = set(), []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def rename(a, b):
        at_rename.append({p.name for p in [a, *a.rglob("*")] if p.stat().st_ino not in flushed})
        real_rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(CheckpointStore(tmp_path), 1, write("x"))
    assert at_rename == [set()]
    assert tmp_path.stat().st_ino in flushed and (tmp_path / "latest").stat().st_ino in flushed


# The child dies before its k-th file operation (every one that Python audits, and every fsync), for each k until a save survives.
KILLED = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {repo!r})
from llmrl.train.checkpoint import CheckpointStore
from tests.train.test_checkpoint import save

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree")
left = None

def tick(*_):
    global left
    if left is not None:
        if left == 0:
            os._exit(9)
        left -= 1

sys.addaudithook(lambda event, args: tick() if event in EVENTS else None)
real = os.fsync
os.fsync = lambda fd: (tick(), real(fd))

def write(text):
    def writer(directory):
        (directory / "model").mkdir()
        (directory / "model" / "weights.bin").write_text(text)
        (directory / "state.json").write_text(json.dumps(text))
    return writer

def text_of(path):
    return json.loads((path / "state.json").read_text())

resave = {resave}
outcomes = []
for k in range(1000):
    root = Path({root!r}) / str(k)
    store = CheckpointStore(root, keep=1)
    save(store, 1, write("first"))
    if resave:
        store.keep = None
        save(store, 2, write("damaged"))
        (store.path(2) / "state.json").write_text("")
    pid = os.fork()
    if pid == 0:
        left = k
        save(store, 2, write("second"))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    newest = store.newest()
    assert newest is not None, k
    outcomes.append(text_of(newest))
    save(CheckpointStore(root, keep=1), 3, write("third"))  # and the run goes on
    assert text_of(store.newest()) == "third"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000003"], list(root.iterdir())
    if code == 0:
        break
    assert code == 9, code
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("resave", [False, True])
def test_killed_at_every_file_operation(tmp_path, resave):
    from pathlib import Path

    import llmrl

    repo = str(Path(llmrl.__file__).parents[1])
    code = textwrap.dedent(KILLED.format(repo=repo, root=str(tmp_path), resave=resave))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 25
    switch = outcomes.index("second")
    assert outcomes == ["first"] * switch + ["second"] * (len(outcomes) - switch)
    assert 0 < switch < len(outcomes) - 1
