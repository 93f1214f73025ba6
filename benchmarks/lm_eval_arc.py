"""ARC by log-prob: lm-eval and ours on the same model and rows. Prints a JSON line; exit code 1 where a row's acc or acc_norm differs.

    pip install 'llmrl[bench]'
    python benchmarks/lm_eval_arc.py --data ../shared/data/eval_arc_easy.jsonl [--model DIR] [--rows 400]

lm-eval's own task file is used; only its data come from the local copy. Without --model a small model with random weights and a
tokenizer of the questions is made. Each differing row is printed with both sides' log-probs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def ours(model: str, data: Path, rows: int) -> list[dict[str, Any]]:
    """The rows of our result, through what `llmrl eval` runs."""
    from llmrl.data.build import prompts_from_rows
    from llmrl.evaluation.benchmarks import asked, load_benchmark
    from llmrl.evaluation.choices import logprobs, read_choices, result_of
    from llmrl.models.forward import PolicyModule

    loaded, tokenizer = load(model)
    name = "arc_challenge_logprob" if "challenge" in data.name else "arc_easy_logprob"
    benchmark = load_benchmark(name, data.parent)
    benchmark = replace(benchmark, problems=benchmark.problems[:rows])
    prompts, _ = prompts_from_rows(asked(benchmark), tokenizer)
    problems = read_choices(prompts, tokenizer)
    found = logprobs(problems, PolicyModule(loaded))
    return result_of(benchmark, problems, prompts, found).rows


def theirs(model: str, data: Path, rows: int) -> list[dict[str, Any]]:
    """lm-eval's samples, in the order of the rows."""
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM

    loaded, tokenizer = load(model)
    task = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_easy.yaml"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "arc.jsonl"
        given = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[:rows]]
        file.write_text("".join(json.dumps(as_published(row)) + "\n" for row in given), encoding="utf-8")
        config = yaml.safe_load(task.read_text(encoding="utf-8"))
        config = {key: value for key, value in config.items() if key not in ("dataset_name", "tag")}
        config |= {"task": "arc_local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        config |= {"training_split": None, "validation_split": None, "test_split": "test"}
        engine = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=16)
        found = lm_eval.simple_evaluate(engine, tasks=[config], num_fewshot=0, log_samples=True, bootstrap_iters=0)
    samples = found["samples"]["arc_local"]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def load(model: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)


def as_published(row: dict[str, Any]) -> dict[str, Any]:
    """A row in the columns of the hub's data set, which lm-eval's task reads."""
    choices = {key: [choice[key] for choice in row["choices"]] for key in ("text", "label")}
    return {"id": row["id"], "question": row["question"], "choices": choices, "answerKey": row["answer"]}


def compare(model: str, data: Path, rows: int) -> dict[str, Any]:
    """How many rows differ, and by how much the log-probs do; `different` has both sides of each differing row."""
    left, right = ours(model, data, rows), theirs(model, data, rows)
    different, gap = [], 0.0
    for a, b in zip(left, right, strict=True):
        assert a["id"] == b["doc"]["id"]
        sums = [float(answer[0][0]) for answer in b["resps"]]
        gap = max(gap, *(abs(x - y) for x, y in zip(a["logprobs"].values(), sums, strict=True)))
        if (a["acc"], a["acc_norm"]) != (b["acc"] == 1, b["acc_norm"] == 1):
            different.append(
                {"id": a["id"], "ours": a["logprobs"], "theirs": sums, "choices": b["doc"]["choices"]["text"]}
            )
    share = {metric: sum(row[metric] for row in left) / len(left) for metric in ("acc", "acc_norm")}
    return {"rows": len(left), **share, "largest_logprob_difference": gap, "different": different}


def small_model(data: Path, folder: Path) -> str:
    from llmrl.models.init import init_model

    texts = [json.loads(line)["question"] for line in data.read_text(encoding="utf-8").splitlines()]
    init_model(
        folder,
        texts=texts,
        vocab_size=2048,
        hidden_size=96,
        num_layers=2,
        num_heads=4,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="ARC by log-prob: lm-eval and ours.")
    parser.add_argument("--data", type=Path, required=True, help="eval_arc_easy.jsonl or eval_arc_challenge.jsonl")
    parser.add_argument("--model", help="default: a small one with random weights")
    parser.add_argument("--rows", type=int, default=400)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args.model or small_model(args.data, Path(folder)), args.data, args.rows)
    for row in found["different"]:
        print(json.dumps(row, ensure_ascii=False), file=sys.stderr)
    print(json.dumps({**found, "different": len(found["different"])}))
    return 1 if found["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
