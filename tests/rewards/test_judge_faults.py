"""Faults of a judge's server and cache that no scripted reply can have: an answer in drops, a foreign entry, a budget in the middle."""

from __future__ import annotations

import gc
import socket
import sqlite3
import threading

from llmrl.cli.main import main
from llmrl.config.reward import RewardSpec
from llmrl.config.rubric import JudgeSettings
from tests.rewards.conftest import rollouts
from tests.rewards.scripted_judge import judge  # noqa: F401  (a fixture)
from tests.rewards.test_judge import kinds, rubric, run, spec, values  # noqa: F401  (a fixture)


def test_an_answer_in_drops_is_late(rubric):  # noqa: F811
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            client, _ = server.accept()
            with client:
                client.recv(1 << 16)
                client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
                for _ in range(500):
                    if over.wait(0.1):
                        break
                    try:
                        client.sendall(b" ")
                    except OSError:
                        break

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            settings = JudgeSettings(base_url=url, model="m", timeout=0.5, retries=0)
            ((row,), _) = run(RewardSpec(rubric=str(rubric), judge=settings), rollouts("a"))
        finally:
            over.set()
            thread.join()
    assert row.outcomes["quality"] == "timeout" and "no answer in 0.5 s" in row.notes["quality"]


def test_what_is_kept_in_another_form_is_not_used(judge, rubric, tmp_path):  # noqa: F811
    file = tmp_path / "judge.sqlite"
    cached = spec(judge, rubric, cache=str(file))
    assert kinds(run(cached, rollouts("a"))[0]) == ["score"]
    with sqlite3.connect(file) as database:
        database.execute("UPDATE verdicts SET verdict = '{\"other\": 1}'")
    judge.script = lambda ask: ask.verdict(4, 2)
    scored, metrics = run(cached, rollouts("a"))
    assert values(scored) == [1.0] and metrics["judge/quality/cache_hits"] == 0


def test_a_budget_spent_in_the_middle_leaves_nothing_pending(judge, rubric, caplog):  # noqa: F811
    gc.collect()
    caplog.clear()
    limited = spec(judge, rubric, budget_calls=3, over_budget="none", concurrency=8)
    assert kinds(run(limited, rollouts(*"abcdefgh"))[0]).count("not-applicable") == 5
    gc.collect()
    assert [r for r in caplog.records if r.name == "asyncio"] == []


def test_judge_check_says_what_was_given(rubric, capsys):  # noqa: F811
    assert main(["judge-check", str(rubric), "--model", "m", "--base-url", "localhost:8000"]) == 2
    assert "--base-url localhost:8000: String should match pattern '^https?://" in capsys.readouterr().err
