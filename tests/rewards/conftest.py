"""Rollouts in one line, and a file of user reward functions that behave in every way that users' functions do."""

from __future__ import annotations

import os
import textwrap
import time

import pytest

from llmrl.types import Completion, Prompt, Rollout

USER_FUNCTIONS = '''
import asyncio, os, subprocess, sys, time
from llmrl.rewards import row_verifier

print("printed at import")
calls = 0


def by_length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def scaled(prompts, completions, answer, factor=2.0, **kwargs):
    return [factor if a in c else 0.0 for c, a in zip(completions, answer)]


def counts_calls(completions, **kwargs):
    global calls
    calls += 1
    return [float(calls)] * len(completions)


def prints(completions, **kwargs):
    print("hello from user code", flush=True)
    os.write(1, b"\\x00\\x00\\x00\\x05{{{{{ raw bytes on fd 1")
    os.write(2, b"raw bytes on fd 2")
    return [1.0] * len(completions)


def raises(completions, **kwargs):
    raise ValueError("the user's own mistake")


def exits(completions, **kwargs):
    sys.exit(3)


def dies(completions, **kwargs):
    os._exit(0)


def too_short(completions, **kwargs):
    return [1.0]


def odd_values(completions, **kwargs):
    return [1, True, None, float("nan"), "1.0"][: len(completions)]


def sleeps(completions, seconds=60, **kwargs):
    time.sleep(seconds)
    return [1.0] * len(completions)


def logs(completions, log_extra, log_metric, trainer_state, **kwargs):
    log_extra("seen", [c.upper() for c in completions])
    log_metric("user/step", trainer_state.global_step)
    log_metric("user/step", trainer_state["global_step"] + 2)
    return [0.5] * len(completions)


async def async_reward(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [0.25] * len(completions)


def make_constant(value):
    def constant(completions, **kwargs):
        return [value] * len(completions)

    return constant


class Constant:
    def __init__(self, value=1.0):
        self.value = value

    def __call__(self, completions, **kwargs):
        return [self.value] * len(completions)


@row_verifier
def row_logs(completion, log_extra, log_metric, trainer_state, **columns):
    log_extra("seen_by_row", [columns, trainer_state.global_step])
    log_metric("row/length", len(completion))
    return float(len(completion))


@row_verifier
def obeys(completion, *, bonus=0.0, **columns):
    """Does what the completion says: the hostile model answers of these tests."""
    verb, _, rest = completion.partition(" ")
    if verb == "hang":
        while True:
            pass
    if verb == "bigint":  # C code that never gives the interpreter lock back
        pow(10**9 + 7, 10**9 + 9, None)
    if verb == "spawn":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(rest, "w") as handle:
            handle.write(str(child.pid))
        time.sleep(600)
    if verb == "die":
        os._exit(1)
    if verb == "die-once" and not os.path.exists(rest):
        open(rest, "w").close()
        os._exit(1)
    if verb == "eat":
        return float(len(bytearray(int(float(rest) * 2**30))) > 0)
    if verb == "raise":
        raise ValueError("row function raised")
    if verb == "none":
        return None
    if verb == "sleep":
        time.sleep(float(rest))
    return 1.0 + bonus
'''


@pytest.fixture(scope="session")
def user_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "my_rewards.py"
    path.write_text(textwrap.dedent(USER_FUNCTIONS))
    return path


def rollout(text: str, number: int = 0, *, prompt="q?", ids=(1, 2), **columns) -> Rollout:
    completion = Completion(tuple(ids), (0.0,) * len(ids), "stop", text)
    return Rollout(Prompt(f"p{number}", (1,), prompt, columns), completion, number % 4)


def rollouts(*texts: str, **columns) -> list[Rollout]:
    return [rollout(text, i, **columns) for i, text in enumerate(texts)]


def alive(pid: int) -> bool:
    """False for a zombie as well: nobody waits for an orphan's orphan here."""
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())


def children() -> set[int]:
    """The direct children of this process."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as handle:
            found |= {int(p) for p in handle.read().split()}
    return found
