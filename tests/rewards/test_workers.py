"""Workers: a deadline a row that starts with the work on it, kills that reach grandchildren, nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.errors import RewardError
from llmrl.rewards import RewardRunner
from llmrl.rewards.tally import Tally
from tests.rewards.conftest import alive, children, rollout, rollouts, wait_until

HOSTILE = r"\boxed{9^{9^{9^9}}}"
# Passes the size guard's look at the text, and math-verify computes it while parsing.
SLOW = r"\boxed{\gcd(9^{x}, \sum_{i=1}^{9^9} i^i)}"


def make(user_file, **options):
    spec = {"function": f"{user_file}:obeys", "timeout": 2.0} | options.pop("spec", {})
    return RewardRunner([RewardSpec(**spec)], workers=2, **{"on_error": "skip", **options})


def test_thirty_two_towers_among_right_answers_cost_nobody_a_score():
    texts = [HOSTILE if i % 2 else r"so \boxed{42}" for i in range(64)]
    with RewardRunner([RewardSpec(function="math_answer")], workers=2) as runner:
        begun = time.monotonic()
        scored = runner.score(rollouts(*texts, answer="42"))
        assert time.monotonic() - begun < 5
    assert [s.reward for s in scored] == [0.0 if i % 2 else 1.0 for i in range(64)]
    assert {s.outcomes["math_answer"] for s in scored} == {"score"}


BOMBS = (
    HOSTILE, r"\boxed{99999999!!}", r"\boxed{10^{10^{12}}}",  # numbers
    r"\boxed{" + "{" * 20_000, r"\boxed{" + r"\frac{1}{" * 4_000 + "}" * 4_000 + "}", "(" * 20_000 + "1" + ")" * 20_000,  # nesting
    r"\boxed{" + "a" * 50_000 + "!}", "$" + "1," * 50_000 + "$", "the answer is " * 20_000,  # what makes patterns try again
    r"\boxed{(x+1)^{999999}}", r"\boxed{[" + "9" * 100_000 + "]}", r"\boxed{\sum_{i=1}^{9^{99}} i}",  # memory
)  # fmt: skip


def test_thirty_two_bombs_in_flight_change_no_neighbour_and_outlast_no_deadline():
    texts = [BOMBS[i // 2 % len(BOMBS)] if i % 2 else r"so \boxed{42}" for i in range(64)]
    with RewardRunner([RewardSpec(function="math_answer", timeout=2.0)], workers=2, on_error="skip") as runner:
        scored = runner.score(rollouts(*texts, answer="42"))
    assert [s.reward for s in scored[::2]] == [1.0] * 32
    assert not any(s.reward for s in scored[1::2]), "no bomb is right"
    assert {s.outcomes["math_answer"] for s in scored} <= {"score", "timeout", "error"}
    assert all(s.seconds.get("math_answer", 0.0) < 20 for s in scored)  # a bomb that is not defused takes minutes


def test_answers_that_pass_the_guard_cost_their_deadline_and_only_their_row():
    texts = [SLOW if i in (0, 5, 6) else r"so \boxed{\frac{84}{2}}" for i in range(24)]
    with RewardRunner([RewardSpec(function="math_answer", timeout=1.0)], workers=2, on_error="stop") as runner:
        scored = runner.score(rollouts(*texts, answer="42"), tally=(tally := Tally()))
    metrics = tally.metrics()
    assert [s.reward for s in scored] == [None if t is SLOW else 1.0 for t in texts], "and the run goes on under `stop`"
    assert metrics["reward_outcomes/math_answer/timeout"] == 3


def test_the_deadline_is_a_row_s_and_not_a_queue_s(user_file):
    with make(user_file, on_error="stop") as runner:
        begun = time.monotonic()
        scored = runner.score(rollouts(*["sleep 0.2"] * 20))
        assert time.monotonic() - begun > 1.5, "longer than the limit of one row"
    assert [s.reward for s in scored] == [1.0] * 20


def test_rows_behind_a_stuck_one_are_scored_by_somebody_else(user_file):
    with make(user_file) as runner:
        scored = runner.score(rollouts(*["ok"] * 3, "hang", *["ok"] * 60, "bigint", *["ok"] * 5))
    assert [s.outcomes["obeys"] for s in scored] == ["score"] * 3 + ["timeout"] + ["score"] * 60 + ["timeout"] + [
        "score"
    ] * 5


def test_a_killed_worker_takes_its_children_along(user_file, tmp_path):
    note = tmp_path / "pid"
    with make(user_file) as runner:
        assert runner.score(rollouts(f"spawn {note}"))[0].outcomes["obeys"] == "timeout"
        assert wait_until(lambda: not alive(int(note.read_text())))


def test_a_row_whose_worker_died_from_outside_is_scored_again(user_file, tmp_path):
    with make(user_file, on_error="stop") as runner:
        scored = runner.score(rollouts("ok", f"die-once {tmp_path / 'mark'}", "ok"))
    assert [s.reward for s in scored] == [1.0, 1.0, 1.0]


def test_memory_is_bounded_and_the_row_says_so(user_file, caplog):
    with make(user_file, spec={"memory_gb": 0.5}, on_error="stop") as runner:
        scored = runner.score(rollouts("eat 0.1", "eat 2", "ok"))
    assert [s.outcomes["obeys"] for s in scored] == ["score", "error", "score"]
    assert "MemoryError" in caplog.text


def test_policy_for_rows_that_a_model_spoilt(user_file):
    with make(user_file, on_error="stop", spec={"timeout": 1.0}) as runner:
        assert [s.reward for s in runner.score(rollouts("die", "ok", "none"))] == [None, 1.0, None]
        with pytest.raises(RewardError, match="4 of 7 rows failed"):
            runner.score(rollouts(*["die"] * 4, *["ok"] * 3))
        with pytest.raises(RewardError, match="row function raised"):
            runner.score(rollouts("ok", "raise", "ok", "ok"))


def test_an_idle_worker_that_was_killed_is_replaced(user_file):
    with make(user_file) as runner:
        runner.score(rollouts("ok"))
        for worker in runner._functions[0].pool._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
        assert runner.score(rollouts("ok"))[0].reward == 1.0


def test_close_leaves_no_process_and_no_descriptor(user_file):
    before, files = children(), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with make(user_file) as runner:
            runner.score(rollouts("ok", "die"))
    assert wait_until(lambda: children() <= before)
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.parametrize("row", ["ok", "hang", "bigint", "spawn {note}", "fork"])
def test_workers_die_with_the_trainer(user_file, tmp_path, row):
    """Also in C code that keeps the interpreter lock, and when a forked child of the trainer (a data loader) lives on."""
    note, pids = tmp_path / "note", tmp_path / "pids"
    script = f"""
        import os, pathlib, threading, time
        from llmrl.config.reward import RewardSpec
        from llmrl.rewards import RewardRunner
        from tests.rewards.conftest import rollouts

        runner = RewardRunner([RewardSpec(function="{user_file}:obeys", timeout=60)], workers=2)
        threading.Thread(target=runner.score, args=(rollouts("{row.format(note=note)}"),), daemon=True).start()
        if "{row}" == "fork" and os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.5)
        found = [w.process.pid for w in runner._functions[0].pool._workers]
        pathlib.Path("{pids}.part").write_text(" ".join(map(str, found)))
        pathlib.Path("{pids}.part").rename("{pids}")
        time.sleep(60)
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        assert wait_until(pids.exists)
        workers = [int(p) for p in pids.read_text().split()]
        if "spawn" in row:
            assert wait_until(lambda: note.exists() and note.read_text())
            workers.append(int(note.read_text()))
        assert workers and all(alive(p) for p in workers)
    finally:
        trainer.kill()
        trainer.wait()
    assert wait_until(lambda: not any(alive(p) for p in workers))


def test_ctrl_c_reaches_the_trainer_only(user_file):
    with make(user_file) as runner:
        for worker in runner._functions[0].pool._workers:
            os.kill(worker.process.pid, signal.SIGINT)
        assert runner.score(rollouts("ok"))[0].reward == 1.0


def test_large_batches_travel(user_file):
    rows = [rollout("x" * 50_000, i) for i in range(200)]
    with RewardRunner([RewardSpec(function=f"{user_file}:by_length")]) as runner:
        assert [s.reward for s in runner.score(rows)] == [50_000.0] * 200


def test_cheap_rows_cost_well_below_a_second(user_file):
    rows = rollouts(*[r"so \boxed{42}"] * 384, answer="42")
    with RewardRunner([RewardSpec(function="math_answer")], workers=2) as runner:
        runner.score(rows[:16])
        begun = time.monotonic()
        scored = runner.score(rows)
        assert time.monotonic() - begun < 2.0  # 0.1 s on an idle machine
    assert sum(s.reward for s in scored) == 384


def test_no_torch_in_rewards_nor_in_its_workers(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys\ndef loaded(completions, log_extra, **kwargs):\n"
        "    log_extra('modules', [sorted({m.partition('.')[0] for m in sys.modules})])\n    return [0.0]\n"
    )
    script = f"""
        import sys
        from llmrl.config.reward import RewardSpec
        from llmrl.rewards import RewardRunner
        from tests.rewards.conftest import rollouts
        import llmrl.rewards.math, llmrl.rewards.worker

        with RewardRunner([RewardSpec(function="math_answer"), RewardSpec(function="{probe}:loaded")]) as runner:
            row = runner.score(rollouts(r"\\\\boxed{{\\\\frac12}}", answer="0.5"))[0]
        assert row.parts["math_answer"] == 1.0, row
        for where, modules in (("trainer", sys.modules), ("worker", row.extra["modules"])):
            assert not {{"torch", "transformers", "accelerate"}} & set(modules), where
        assert "pydantic" not in row.extra["modules"]
    """
    conftest_free = textwrap.dedent(script)
    subprocess.run([sys.executable, "-c", conftest_free], check=True, timeout=120)
