"""Where processes stand: what is noted, who is named when one is lost, and which errors are about that."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
import torch.distributed as dist

from llmrl.errors import LostProcessError
from llmrl.train import standing as module
from llmrl.train.standing import Standing, Trouble

CLOSED = RuntimeError(
    "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically caused by a crash."
)
WAITING = {
    "places": [["step 3, update 3, microbatch 1/1", 9.0, True]],
    "code": "torch.autograd.graph._engine_run_backward, line 9",
}


def entry(**settings):
    """What a process of another machine, which waits for the others, publishes."""
    return json.dumps({"pid": 1, "machine": "elsewhere", "beat": 1, "ended": None, **WAITING, **settings})


@pytest.fixture
def watched(monkeypatch):
    """Rank 0 of three, and `say(rank, **entry)`, which publishes for the others."""
    monkeypatch.setattr(module, "TICK", 0.02)
    monkeypatch.setattr(module, "_watching", None)
    store, here = dist.HashStore(), Standing(0, 3, timeout=60.0)
    here.watch(store)
    here.say = lambda rank, **settings: store.set(f"standing/{module._number}/{rank}", entry(**settings))
    yield here
    here.end(None)


def heard(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def from_all(here):
    heard(lambda: all(peer.raw for peer in here._peers.values()))


def test_places():
    here = Standing()
    assert here.places()[0][0] == "starting"
    here.begin_step(3)
    with here.during("update 5", waits=True):
        here.at("microbatch 1/2")
        here.at("microbatch 2/2")
        with here.during("gather_json", waits=True):
            assert here.places()[0][::2] == ("step 3, update 5, microbatch 2/2, gather_json", True)
        assert here.places()[0][::2] == ("step 3, update 5, microbatch 2/2", True)
    assert here.places()[0][::2] == ("step 3", False)
    with pytest.raises(ZeroDivisionError), here.during("saving"):
        raise ZeroDivisionError
    assert here.places()[0][0] == "step 3"


def test_a_thread_beside_the_main_one_has_a_place_of_its_own():
    here, inside, leave = Standing(), threading.Event(), threading.Event()

    def sample():
        with here.during("sampling for step 4"):
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=sample, name="rollouts-ahead")
    here.begin_step(3)
    thread.start()
    inside.wait(5)
    assert [place for place, *_ in here.places()] == ["step 3", "rollouts-ahead: sampling for step 4"]
    leave.set()
    thread.join()
    assert [place for place, *_ in here.places()] == ["step 3"]


def test_only_errors_of_the_transport_are_explained(watched):
    assert watched.explain(torch.OutOfMemoryError("CUDA out of memory")) is None
    assert watched.explain(ValueError("gloo/ in a text of mine")) is None
    assert Standing().explain(CLOSED) is None  # one process has no others
    with pytest.raises(RuntimeError, match="shape"), watched.during("update 1"):
        raise RuntimeError("shape mismatch")
    watched.saved_step = 7
    with pytest.raises(LostProcessError) as lost, watched.during("update 1"):
        raise CLOSED
    text = str(lost.value)
    assert "so rank 0 of 3 can't go on (Connection closed by peer [127.0.0.1]:1)" in text
    assert "rank 0 (this one): update 1" in text and "rank 1, 2: never said where it stands" in text
    assert "continues from the checkpoint of step 7" in text


@pytest.mark.parametrize(
    "odd, named",
    [
        ({"ended": ""}, "rank 2 ended its run"),
        ({"places": [["step 3, sampling for step 3", 9.0, False]]}, "rank 2 did not come in time"),
        ({"code": "my_rewards.search, line 5"}, "rank 2 did not come in time"),
    ],
)
def test_who_is_late(watched, odd, named):
    watched.say(1)
    watched.say(2, **odd)
    from_all(watched)
    for peer in watched._peers.values():
        peer.news = watched._heard + 60.0  # heard of in this moment
    watched._suspect()
    assert str(watched._lost("")).startswith(named)


def test_a_failure_is_told_at_once_and_the_first_one_stands(watched):
    watched.say(1)
    watched._store.set(module._TROUBLE, json.dumps([1, "failed with RewardError: no verdict"]))
    heard(lambda: watched.trouble is not None)
    with pytest.raises(LostProcessError, match="rank 1 failed with RewardError: no verdict, so rank 0"):
        watched.at("microbatch 1/2")
    watched.end(ValueError("because of that"))
    assert watched.trouble == Trouble(1, "failed with RewardError: no verdict")


def test_an_error_of_ones_own_is_told_to_the_others(watched):
    store = watched._store
    watched.end(ValueError("row 17\nand more"))
    assert json.loads(store.get(module._TROUBLE)) == [0, "failed with ValueError: row 17"]
    assert json.loads(store.get("0"))["ended"] == "ValueError: row 17"


def test_a_silent_machine_is_lost(watched, monkeypatch):
    watched.say(1)
    watched.say(2)
    from_all(watched)
    assert watched.trouble is None
    monkeypatch.setattr(module, "SILENCE", 0.1)
    heard(lambda: watched.trouble is not None)
    assert watched.trouble.what == "gave no sign of life for 0 s"


def test_a_process_of_this_machine_is_lost_when_its_number_is_gone(watched):
    watched.say(2, machine=module._machine(), pid=2**22 + 1)
    heard(lambda: watched.trouble is not None)
    assert watched.trouble == Trouble(2, f"died (process {2**22 + 1} is gone)")


@pytest.mark.parametrize("agent, who", [("", "rank 0"), ("True", "the launcher")])
def test_a_store_that_does_not_answer(monkeypatch, agent, who):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    here = Standing(1, 2)
    here._heard -= 60
    here._suspect()
    assert str(here._lost("")).startswith(f"{who} gives no sign of life: the processes' store")
