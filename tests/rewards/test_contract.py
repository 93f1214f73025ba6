"""TRL's contract: functions of the kinds that users bring from TRL and open-r1 run unchanged, with the values that they give alone.

The functions are restated here from their descriptions, in the signatures and the styles that those projects' users write.
"""

from __future__ import annotations

import asyncio
import functools
import http.server
import importlib.util
import json
import math
import re
import threading
import urllib.request

import pytest

from llmrl.config.reward import RewardSpec
from llmrl.rewards import RewardRunner
from llmrl.types import Completion, Prompt, Rollout
from tests.rewards.test_session import prompts_of

QUESTION = [{"role": "system", "content": "Think first."}, {"role": "user", "content": "2 + 2?"}]
R1 = "<think>\nStep 1: add\nStep 2: check\n- done\n</think>\n<answer>\n\\boxed{4}\n</answer>"
TEXTS = [
    [R1, "5", "", "4 4 4 4 4 4"],
    ["```python\nx = 4\n```", "<think>\na\n</think>\n<answer>\n4\n</answer>", "\\boxed{4}", "é" * 60],
]
SOLUTIONS = ["$\\boxed{4}$", None]


def groups(conversational):
    out = []
    for g, texts in enumerate(TEXTS):
        columns = {"solution": SOLUTIONS[g], "language": "python", "level": g}
        prompt = Prompt(f"p{g}", (1,), QUESTION if conversational else "2 + 2?", columns)
        out.append(
            [
                Rollout(prompt, Completion(tuple(map(ord, t)), (0.0,) * len(t), "stop", t), n)
                for n, t in enumerate(texts)
            ]
        )
    return out


def texts_of(completions):
    """open-r1's functions read messages only; plain rows are strings."""
    return [c if isinstance(c, str) else c[0]["content"] for c in completions]


def right(text, solution):
    answer = re.search(r"\\boxed\{(.*?)\}", solution)
    return answer is not None and (f"\\boxed{{{answer[1]}}}" in text or text.strip() == answer[1])


def accuracy(completions, solution, **kwargs):
    return [None if s is None else float(right(t, s)) for t, s in zip(texts_of(completions), solution, strict=True)]


def format_reward(completions, **kwargs):
    pattern = re.compile(r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL)
    return [1.0 if pattern.match(t) else 0.0 for t in texts_of(completions)]


def tag_count_reward(completions, **kwargs) -> list[float]:
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return [0.25 * sum(t.count(tag) == 1 for tag in tags) for t in texts_of(completions)]


def reasoning_steps_reward(completions, **kwargs):
    pattern = re.compile(r"Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,")
    return [min(1.0, len(pattern.findall(t)) / 3) for t in texts_of(completions)]


def len_reward(completions: list[dict[str, str]], solution: list[str], **kwargs) -> float:
    """Kimi 1.5's: shorter than the batch's others is better, and a wrong answer gains nothing by it."""
    texts = texts_of(completions)
    sizes = [len(t) for t in texts]
    low, high = min(sizes), max(sizes)
    if low == high:
        return [0.0] * len(texts)
    lams = [0.5 - (n - low) / (high - low) for n in sizes]
    fine = [s is None or right(t, s) for t, s in zip(texts, solution, strict=True)]
    return [lam if f else min(0, lam) for lam, f in zip(lams, fine, strict=True)]


def get_cosine_scaled_reward(min_wrong=-1.0, max_wrong=-0.5, min_right=0.5, max_right=1.0, max_len=50):
    def cosine_scaled_reward(completions, solution, **kwargs):
        out = []
        for text, gold in zip(texts_of(completions), solution, strict=True):
            if gold is None:
                out.append(None)
                continue
            share = math.cos(min(len(text), max_len) / max_len * math.pi)
            low, high = (min_right, max_right) if right(text, gold) else (max_wrong, min_wrong)
            out.append(low + 0.5 * (high - low) * (1 + share))
        return out

    return cosine_scaled_reward


def get_repetition_penalty_reward(ngram_size: int, max_penalty: float):
    if max_penalty > 0:
        raise ValueError("max_penalty is positive")

    def repetition_penalty_reward(completions, **kwargs) -> list[float]:
        out = []
        for words in (t.lower().split() for t in texts_of(completions)):
            grams = [tuple(words[i : i + ngram_size]) for i in range(len(words) - ngram_size + 1)]
            out.append((1 - len(set(grams)) / len(grams)) * max_penalty if grams else 0.0)
        return out

    return repetition_penalty_reward


def get_code_format_reward(language: str = "python"):
    pattern = re.compile(rf"```{language}\n.*?```", re.DOTALL)

    def code_format_reward(completions, **kwargs):
        return [float(pattern.search(t) is not None) for t in texts_of(completions)]

    return code_format_reward


def get_soft_overlong_punishment(max_completion_len, soft_punish_cache):
    def soft_overlong_punishment_reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
        start = max_completion_len - soft_punish_cache
        sizes = [len(ids) for ids in completion_ids]
        return [0.0 if n <= start else max(-1.0, (start - n) / soft_punish_cache) for n in sizes]

    return soft_overlong_punishment_reward


def all_functions():
    return [
        accuracy, format_reward, tag_count_reward, reasoning_steps_reward, len_reward, get_cosine_scaled_reward(),
        get_repetition_penalty_reward(2, -1.0), get_code_format_reward(), get_soft_overlong_punishment(60, 40),
    ]  # fmt: skip


def as_async(function):
    @functools.wraps(function)
    async def waits(*args, **kwargs):
        await asyncio.sleep(0.001)
        return function(*args, **kwargs)

    return waits


def alone(function, rows):
    """What a function gives when it is called as TRL would call it, with everything by keyword."""
    prompts = [r.prompt.text for r in rows]
    plain = isinstance(prompts[0], str)
    said = [r.completion.text for r in rows]
    return function(
        prompts=prompts,
        completions=said if plain else [[{"role": "assistant", "content": t}] for t in said],
        completion_ids=[list(r.completion.ids) for r in rows],
        **{k: [r.prompt.columns[k] for r in rows] for k in ("solution", "language", "level")},
    )


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("kind", ["sync", "async", "mixed", "streamed"])
def test_open_r1_s_list(conversational, kind):
    made = groups(conversational)
    rows = [r for group in made for r in group]
    plain = all_functions()
    given = [as_async(f) if kind == "async" or (kind == "mixed" and n % 2) else f for n, f in enumerate(plain)]
    weights = [1.0 + n / 8 for n in range(len(plain))]
    runner = RewardRunner([], reward_funcs=list(zip(given, weights, strict=True)))
    with runner, runner.session(prompts_of(made), {"global_step": 1}) as session:
        for i in (1, 0) if kind == "streamed" else ():
            session.add(i, made[i])
        scored = [row for group in session.finish(made) for row in group]
    expected = {f.__name__: alone(f, rows) for f in plain}
    assert {name: [row.parts[name] for row in scored] for name in expected} == expected
    assert any(len(set(values)) > 1 for values in expected.values())
    for n, row in enumerate(scored):
        known = [(v[n], w) for v, w in zip(expected.values(), weights, strict=True) if v[n] is not None]
        assert row.reward == pytest.approx(sum(v * w for v, w in known))


def test_what_open_r1_s_list_gives_for_a_good_answer():
    """So that the comparison above is not one of zeros."""
    scored = {f.__name__: alone(f, groups(True)[0])[0] for f in all_functions()}
    wanted = {"accuracy": 1.0, "format_reward": 1.0, "tag_count_reward": 1.0, "reasoning_steps_reward": 1.0}
    assert {k: scored[k] for k in wanted} == wanted
    assert scored["soft_overlong_punishment_reward"] == -1.0 and scored["cosine_scaled_reward"] == pytest.approx(0.5)


def test_by_path_with_arguments_of_factories():
    """The same file, named in a recipe: it runs in workers."""
    specs = [
        RewardSpec(function=f"{__file__}:accuracy"),
        RewardSpec(function=f"{__file__}:get_cosine_scaled_reward", args={"max_len": 20}),
        RewardSpec(
            function=f"{__file__}:get_soft_overlong_punishment",
            args={"max_completion_len": 60, "soft_punish_cache": 40},
        ),
    ]
    rows = [r for group in groups(True) for r in group]
    with RewardRunner(specs, workers=1) as runner:
        scored = runner.score(rows)
    functions = [accuracy, get_cosine_scaled_reward(max_len=20), get_soft_overlong_punishment(60, 40)]
    for name, function in zip(runner.names, functions, strict=True):
        assert [row.parts[name] for row in scored] == alone(function, rows)


class Judge(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        answer = json.dumps({"score": len(text) / 100}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_clients_closures_and_objects(judge):
    """What can't be pickled runs where it was made: a client with a lock, a closure over it, an object with async calls, a partial."""
    import httpx

    lock, asked = threading.Lock(), []
    client = httpx.Client(base_url=judge, trust_env=False)

    def by_client(completions, **kwargs):
        with lock:
            asked.extend(kwargs["level"])
            return [client.post("/", json={"text": t}).json()["score"] for t in texts_of(completions)]

    class ByAsyncClient:
        client: httpx.AsyncClient | None = None

        async def __call__(self, completions, trainer_state, log_extra, log_metric, **kwargs):
            self.client = self.client or httpx.AsyncClient(base_url=judge, trust_env=False)  # kept: its loop goes on
            answers = await asyncio.gather(*(self.client.post("/", json={"text": t}) for t in texts_of(completions)))
            log_extra("judged", [len(t) for t in texts_of(completions)])
            log_metric("judge/step", trainer_state.global_step)
            return [a.json()["score"] for a in answers]

    def opener(url, completions, **kwargs):
        def ask(text):
            request = urllib.request.Request(url, json.dumps({"text": text}).encode())
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
                return json.load(answer)["score"]

        return [ask(t) for t in texts_of(completions)]

    rows = [r for group in groups(True) for r in group]
    wanted = [len(r.completion.text) / 100 for r in rows]
    with (
        client,
        RewardRunner([], reward_funcs=[by_client, ByAsyncClient(), functools.partial(opener, judge)]) as runner,
    ):
        for step in (1, 2):
            scored = runner.score(rows, {"global_step": step})
            assert [[row.parts[name] for row in scored] for name in ("by_client", "ByAsyncClient", "opener")] == [
                wanted
            ] * 3
    assert [row.extra["judged"] for row in scored] == [len(r.completion.text) for r in rows]
    assert asked == [r.prompt.columns["level"] for r in rows] * 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_all_of_trl_s_own_rewards_unchanged():
    from trl import rewards

    functions = [
        rewards.accuracy_reward,
        rewards.reasoning_accuracy_reward,
        rewards.think_format_reward,
        rewards.get_cosine_scaled_reward(max_len=50),
        rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0),
        rewards.get_soft_overlong_punishment(max_completion_len=60, soft_punish_cache=40),
    ]
    made = groups(True)[:1]  # they need a solution in every row
    rows = made[0]
    with (
        RewardRunner([], reward_funcs=functions) as runner,
        runner.session(prompts_of(made), {"global_step": 1}) as session,
    ):
        session.add(0, rows)
        scored = session.finish(made)[0]
    public = {n for n in rewards.__all__ if n.endswith("_reward") or n.startswith("get_")}
    assert len(public) == len(functions), f"TRL has further rewards: {public}"
    for name, function in zip(runner.names, functions, strict=True):
        assert [row.parts[name] for row in scored] == alone(function, rows), name
    assert scored[0].parts["accuracy_reward"] == 1.0 and scored[1].parts["accuracy_reward"] == 0.0
