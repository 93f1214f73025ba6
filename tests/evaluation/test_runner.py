"""What evaluation counts, with an engine and a scorer that answer from a table."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from llmrl.errors import DataError, LLMRLError, RolloutError
from llmrl.evaluation.result import EvalResult
from llmrl.evaluation.runner import evaluate
from llmrl.types import Completion, Prompt, Rollout, Sampling, ScoredRollout
from tests.scorers import PlainScorer

SAMPLING = Sampling(max_tokens=8, temperature=0.7)


class Engine:
    """Answers "0", "1", ... to a problem's samples, whose number is in the request's id; every third is cut by the limit."""

    version = 0

    def __init__(self):
        self.calls, self.asked = [], []

    def generate(self, prompts, num_generations, sampling, on_group=None):
        assert num_generations == 1
        self.calls.append(len(prompts))
        groups = []
        for place, p in enumerate(prompts):
            i = int(p.id.partition("#")[2] or 0)
            self.asked.append(p.id)
            finish = "length" if i % 3 == 2 else "stop"
            groups.append([Rollout(p, Completion((7,) * (i + 1), (-0.1,) * (i + 1), finish, str(i)))])
            if on_group is not None:
                on_group(place, groups[-1])
        return groups


class Scorer(PlainScorer):
    """Reward of prompt k: 1 for its first k completions, else 0; `broken` maps (prompt, sample) to an outcome without reward."""

    def __init__(self, broken=()):
        self.broken = dict(broken)

    def score(self, rollouts, trainer_state=None):
        out = []
        for r in rollouts:
            reason = self.broken.get((r.prompt.id, r.index), "score")
            value = float(r.index < r.prompt.columns["k"]) if reason == "score" else None
            out.append(ScoredRollout(r, value, {"f": value}, {"f": reason}))
        return out


def prompts(*ks):
    return [Prompt(str(i), (1, 2), "q", {"k": k}) for i, k in enumerate(ks)]


def test_counts_accuracy_pass_at_k_lengths_and_truncation():
    engine = Engine()
    result = evaluate(prompts(0, 1, 4, 2, 4), engine, Scorer(), n=4, sampling=SAMPLING, batch_size=2)
    assert engine.calls == [8, 8, 4]
    assert result.correct == [0, 1, 4, 2, 4]
    assert result.accuracy == pytest.approx(11 / 20)
    assert result.interval[0] < 11 / 20 < result.interval[1]
    assert result.pass_at_k[4] == pytest.approx(4 / 5)
    assert result.mean_length == pytest.approx(2.5)
    assert result.truncation_rate == pytest.approx(1 / 4)
    assert result.failures == {}
    assert result.mean_reward == pytest.approx(11 / 20)
    assert result.reward_interval == (result.metrics()["reward_low"], result.metrics()["reward_high"])
    assert result.reward_interval[0] < 11 / 20 < result.reward_interval[1]
    assert result.to_dict()["reward_interval"] == list(result.reward_interval)
    assert [row["id"] for row in result.rows] == ["0", "1", "2", "3", "4"]


def test_scorer_failures_count_as_wrong_and_are_listed():
    broken = {("0", 0): "timeout", ("0", 1): "error", ("1", 0): "not-applicable"}
    result = evaluate(prompts(2, 2), Engine(), Scorer(broken), n=2, sampling=SAMPLING)
    assert result.accuracy == pytest.approx(1 / 4)
    assert result.failures == {"timeout": 1, "error": 1, "not-applicable": 1}
    assert result.mean_reward == 1.0  # over the one completion that has a reward
    assert result.reward_interval is None and "reward_low" not in result.metrics()
    assert result.metrics()["scorer_failures"] == 3


def test_the_threshold_decides_what_is_right():
    class Half(Scorer):
        def score(self, rollouts, trainer_state=None):
            return [replace(s, reward=0.5) for s in super().score(rollouts)]

    assert evaluate(prompts(0, 0), Engine(), Half(), n=1, sampling=SAMPLING, threshold=0.5).accuracy == 1
    assert evaluate(prompts(0, 0), Engine(), Half(), n=1, sampling=SAMPLING, threshold=0.6).accuracy == 0


def two_processes(run):
    """What `run(rank, gather)` returns or raises, of two threads that gather like processes."""
    values, meeting = [None, None], threading.Barrier(2, timeout=5)

    def process(rank):
        def gather(value):
            values[rank] = json.loads(json.dumps(value))
            meeting.wait()
            found = list(values)
            meeting.wait()
            return found

        return run(rank, gather)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(process, rank) for rank in range(2)]
    return [future.exception() or future.result() for future in futures]


def test_processes_see_the_whole_result_and_call_the_engine_equally_often():
    everything, engines = prompts(0, 1, 2, 3, 4), [Engine(), Engine()]
    whole = evaluate(everything, Engine(), Scorer(), n=3, sampling=SAMPLING)

    def run(rank, gather):
        share = everything[rank::2]
        return evaluate(share, engines[rank], Scorer(), n=3, sampling=SAMPLING, batch_size=2, gather=gather)

    assert [result.metrics() for result in two_processes(run)] == [whole.metrics()] * 2
    assert [engine.calls for engine in engines] == [[6, 3], [6, 0]]


def test_an_error_of_one_process_reaches_the_other():
    class Failing(Engine):
        def generate(self, *args, **kwargs):
            raise RolloutError("no server")

    def run(rank, gather):
        engine = Failing() if rank else Engine()
        return evaluate(prompts(0), engine, Scorer(), n=1, sampling=SAMPLING, gather=gather)

    other, own = two_processes(run)
    assert isinstance(own, RolloutError)
    assert isinstance(other, LLMRLError) and "process 1 failed: RolloutError: no server" in str(other)


def test_results_are_json_with_the_manifest(tmp_path):
    result = evaluate(
        prompts(1, 0), Engine(), Scorer(), n=2, sampling=SAMPLING, name="b", manifest={"seed": 3}, breakdown=["k"]
    )
    saved = json.loads(result.save(tmp_path / "new" / "r.json").read_text())
    assert (saved["format"], saved["benchmark"], saved["n"], saved["samples"]) == ("llmrl-result/1", "b", 2, 2)
    assert saved["accuracy"] == 0.25 and saved["pass_at_k"] == {"1": 0.25, "2": 0.5} and saved["missing"] == []
    assert 0 < saved["interval"][0] < saved["interval"][1] <= 1
    assert saved["breakdown"]["k"]["1"]["n"] == 1 and saved["breakdown"]["k"]["1"]["accuracy"] == 0.5
    assert saved["maj_at_k"] is None and saved["format_rate"] is None  # this scorer reads no answers
    assert saved["per_row"][0]["completions"] == ["0", "1"] and saved["per_row"][0]["meta"] == {"k": 1}
    assert saved["manifest"] == {"seed": 3}
    lists = [value for value in saved["per_row"][0].values() if isinstance(value, list)]
    assert len(lists) == 8 and {len(value) for value in lists} == {2}


def test_no_problem_is_an_error():
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate([], Engine(), Scorer(), n=1, sampling=SAMPLING)


def test_rows_of_several_processes_come_in_the_order_of_the_problems():
    rows = [{"id": id, "correct": [True]} for id in ("a", "c", "b")]  # of processes 0, 0 and 1
    assert [row["id"] for row in EvalResult(rows, "x").in_order(["a", "b", "c"]).rows] == ["a", "b", "c"]
