"""What samples for an evaluation: real vLLM, as a server and in the process, beside the local engine; and servers that fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llmrl.evaluation.engines as engines
from llmrl.cli.main import main
from llmrl.config.evaluation import EvalConfig
from llmrl.errors import RolloutError
from llmrl.evaluation.engines import ServedModel
from llmrl.models.source import Source
from llmrl.rollout.vllm_client import ServerFault, ServerGone
from llmrl.types import Prompt, Sampling
from tests.evaluation import resume_worker
from tests.processes import run_script
from tests.servers import require_vllm

SAMPLING = Sampling(max_tokens=4, temperature=0.5)
PROMPTS = [Prompt(str(i), (1, 2, i), "") for i in range(5)]


@pytest.fixture
def benchmark(tmp_path):
    rows = [{"id": f"p{i}", "question": f"{i} + {i} = ", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "mine.yaml"
    path.write_text(
        'title: t\ndata: rows.jsonl\nscorer: exact_match\nmax_completion_length: 8\nprompts: {chat: {user: "{question}"}}\n'
    )
    return path


def result(out):
    found = json.loads((out / "mine.json").read_text())
    return [row["completions"] for row in found["per_row"]], found["manifest"]


def local(benchmark, model, out):
    assert main(["eval", "--model", str(model), "--benchmark", str(benchmark), "--output", str(out)]) == 0
    return result(out)


def test_a_real_server_answers_as_the_local_engine(
    vllm_server, benchmark, tmp_path, monkeypatch, tiny_model_dir, capsys
):
    monkeypatch.setenv("LLMRL_SERVER_TOKEN", vllm_server.token)
    served = ["--benchmark", str(benchmark), "rollout.engine=vllm_server", f"rollout.urls=[{vllm_server.url}]"]
    arguments = ["eval", "--model", str(vllm_server.model), *served, "--output", str(tmp_path / "served")]
    assert main(arguments) == 0
    completions, manifest = result(tmp_path / "served")
    assert completions == local(benchmark, vllm_server.model, tmp_path / "local")[0]
    assert manifest["engine"]["kind"] == "vllm_server" and manifest["engine"]["dtype"] == "float32"
    assert manifest["model"]["name"] == str(vllm_server.model)
    assert main([*arguments, "--overwrite", "n=3", "temperature=1", "max_completion_length=6"]) == 0
    assert all(len(set(group)) > 1 for group in result(tmp_path / "served")[0])
    capsys.readouterr()
    assert main(["eval", "--model", str(tiny_model_dir), *served]) == 2
    assert "whose tokenizer is not that of" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "max_completion_length=600"]) == 2
    assert "the model takes 512" in capsys.readouterr().err


@pytest.mark.slow
def test_vllm_in_the_process_answers_as_the_local_engine(vllm_model, benchmark, tmp_path):
    require_vllm()
    script = Path(resume_worker.__file__)  # a process of its own: what vLLM does to it must not reach other tests
    arguments = ["eval", "--model", vllm_model, "--benchmark", benchmark, "--output", tmp_path / "colocated"]
    engine = ["rollout.engine=vllm_colocate", "rollout.vllm_args.kv_cache_memory_bytes=134217728"]
    done = run_script(script, 0, *arguments, *engine)
    assert done.returncode == 0, done.stderr[-3000:]
    completions, manifest = result(tmp_path / "colocated")
    reference, its_manifest = local(benchmark, vllm_model, tmp_path / "local")
    assert completions == reference and manifest["engine"]["kind"] == "vllm_colocate"
    assert manifest["model"] == its_manifest["model"] and manifest["model"]["weights_sha256"]


class Server:
    """Answers with its own number, or fails as often as it is told to."""

    def __init__(self, url, tokenizer, faults=0, error=None, ids=(7, 7), reason="length"):
        self.url, self.tokenizer, self.faults, self.ids, self.reason = url, tokenizer, faults, ids, reason
        self.error, self.asked = error or ServerGone(url, "lost"), []

    def models(self):
        return [{"id": "m", "root": "r", "max_model_len": 64}]

    def tokenise(self, model, text):
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def complete(self, body, timeout):
        self.asked.append(body)
        if self.faults:
            self.faults -= 1
            raise self.error
        return {"choices": [{"token_ids": list(self.ids), "finish_reason": self.reason}]}

    def hang_up(self):
        pass

    close = hang_up


@pytest.fixture
def served(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(engines, "_REST", 0.01)

    def make(**settings):
        urls = [f"http://127.0.0.1:{port}" for port in (1, 2)]
        config = EvalConfig(
            model_name_or_path=str(tiny_model_dir), benchmark="b", rollout={"engine": "vllm_server", "urls": urls}
        )
        source = Source(config)
        tokenizer = source.tokenizer()
        made = {url: Server(url, tokenizer, **(settings if url == urls[0] else {})) for url in urls}
        monkeypatch.setattr(engines, "VLLMServer", lambda url, token, connections: made[url])
        return ServedModel(config, source, tokenizer), list(made.values())

    return make


def test_requests_are_spread_and_sent_again_elsewhere(served):
    engine, servers = served(faults=2)
    seen = []
    groups = engine.generate(PROMPTS, 1, SAMPLING, on_group=lambda place, group: seen.append((place, group)))
    assert [g[0].prompt for g in groups] == PROMPTS and sorted(seen, key=lambda s: s[0]) == list(enumerate(groups))
    assert all(len(server.asked) >= 2 for server in servers) and sum(len(s.asked) for s in servers) == len(PROMPTS) + 2
    seeds = {tuple(body["prompt"]): body["seed"] for server in servers for body in server.asked}
    assert len(set(seeds.values())) == len(PROMPTS) and engine.limit == 64


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"faults": 99}, None),  # the other server takes all
        ({"faults": 99, "error": ServerFault("u", "HTTP 400: no such model", 400)}, "HTTP 400"),
        ({"ids": (7,) * 9}, None),
    ],
)
def test_faults(served, settings, message):
    engine, _ = served(**settings)
    if message is None:
        assert len(engine.generate(PROMPTS, 1, SAMPLING)) == len(PROMPTS)
        return
    with pytest.raises(RolloutError, match=message):
        engine.generate(PROMPTS, 1, SAMPLING)


def test_what_a_caller_raises_ends_the_call_at_once(served):
    engine, servers = served()

    def stop(place, group):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS * 200, 1, SAMPLING, on_group=stop)
    assert sum(len(server.asked) for server in servers) < 1000


def test_log_probs_of_choices_need_the_local_engine(tmp_path, tiny_model_dir, capsys):
    path = tmp_path / "choices.yaml"
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(
            {
                "id": "1",
                "question": "q",
                "answer": "A",
                "choices": [{"label": "A", "text": "a"}, {"label": "B", "text": "b"}],
            }
        )
        + "\n"
    )
    path.write_text('title: t\ndata: rows.jsonl\nconvert: arc\nmode: choices\nprompts: {plain: {text: "{question}"}}\n')
    engine = ["rollout.engine=vllm_server", "rollout.urls=[http://127.0.0.1:1]"]
    assert main(["eval", "--model", str(tiny_model_dir), "--benchmark", str(path), *engine]) == 2
    assert "use the local engine" in capsys.readouterr().err
    assert (
        main(["eval", "--model", str(tiny_model_dir), "--benchmark", str(path), "--output", str(tmp_path / "o")]) == 0
    )
    found = json.loads((tmp_path / "o" / "choices.json").read_text())
    assert found["acc"]["accuracy"] == found["accuracy"] and found["manifest"]["sampling"]["metric"] == "accuracy"
