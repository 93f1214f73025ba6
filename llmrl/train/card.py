"""The model card: where a model comes from, what it was trained on and how, what it scored, how to load it.

The front matter is the hub's metadata of a model (base_model, datasets, library_name, tags, model-index).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmrl.train.files import write_atomically
from llmrl.train.records import read_metrics

if TYPE_CHECKING:
    from llmrl.models.export import Exported

_KINDS = {
    "sft": "supervised fine-tuning",
    "reward": "reward modelling",
    "dpo": "preference optimisation (DPO and its relatives)",
    "ppo": "reinforcement learning (PPO)",
    "grpo": "reinforcement learning without a critic (GRPO and its relatives)",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = (".json", ".jsonl", ".gz", ".parquet", ".csv", ".arrow", ".txt")
_LOCAL = re.compile(r"(/|~/|[A-Za-z]:\\)[^/\\\n]+[/\\].*")
_CREDENTIALS = re.compile(r"//[^/@\s]+@")


def write_card(
    directory: Path, *, name: str, run: Path | None, step: int | None, source: str, model: Exported | None = None
) -> None:
    """Writes README.md beside the weights in `directory`, of what the `run` recorded up to `step`; None: not known.

    `source` is the model as it was before it was exported; `model` what the export says of it, None for a run's own final model.
    """
    recipe: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if run else {}
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8")) if run else {}
    metrics = _metrics(run, step)
    results = [*_benchmarks(run, step), *_evaluation(recipe, metrics)]
    config = _json(directory / "config.json")
    adapter = _json(directory / "adapter_config.json")
    scores = model.task == "SEQ_CLS" if model else summary.get("kind") == "reward"
    base = adapter.get("base_model_name_or_path") or recipe.get("model_name_or_path") or source
    front = _front_matter(name, recipe, summary, results, base=base, adapter=bool(adapter), scores=scores)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120)}---\n",
        f"# {name}\n",
        _opening(base, summary, step, adapter=bool(adapter), scores=scores),
        _loading(name, base, adapter, scores, model.not_for_vllm if model else ""),
        _training(recipe, summary, metrics),
        _results(results),
        _recipe(recipe),
        _environment(summary, config),
        "## Licence\n\nNot stated by this card. The terms of the base model and of the data sets apply; add `license:` to the front "
        "matter above.\n",
    ]
    write_atomically(directory / "README.md", "\n".join(part for part in parts if part))


def _front_matter(
    name: str, recipe: Mapping[str, Any], summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *,
    base: str, adapter: bool, scores: bool,
) -> dict[str, Any]:  # fmt: skip
    kind, origin = summary.get("kind"), _origin(base)
    task = "text-classification" if scores else "text-generation"
    tags = ["llmrl", *([kind] if kind else []), *(["reward-model"] if scores else []), *(["lora"] if adapter else [])]
    front: dict[str, Any] = {}
    if origin and (recipe or adapter):
        front |= {"base_model": origin, "base_model_relation": "adapter" if adapter else "finetune"}
    if datasets := [s["path"] for s in recipe.get("dataset") or [] if _is_hub_id(s["path"])]:
        front["datasets"] = list(dict.fromkeys(datasets))
    front |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": task, "tags": tags}
    if results:
        front["model-index"] = [{"name": name, "results": [_indexed(task, result) for result in results]}]
    return front


def _indexed(task: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """One result in the form of the hub's model-index; what its form has no place for is among the metric's `args`."""
    args = {k: result[k] for k in ("interval", "problems", "samples") if result.get(k) is not None}
    metric = {"type": result["metric"], "value": result["value"], "name": result["label"]}
    return {
        "task": {"type": task},
        "dataset": {"type": result["dataset"], "name": result["dataset"]},
        "metrics": [metric | ({"args": args} if args else {})],
    }


def _benchmarks(run: Path | None, step: int | None) -> Iterator[dict[str, Any]]:
    """Of the model of that step; results of other steps are those of another model."""
    if run is None or step is None:
        return
    for file in sorted((run / "evaluations" / f"step_{step:08d}").glob("*.json")):
        found = _json(file)
        if "benchmark" not in found or "accuracy" not in found:
            continue
        yield {
            "dataset": found["benchmark"] or file.stem, "metric": "accuracy", "value": round(found["accuracy"], 6),
            "label": f"accuracy (avg@{found['samples']})", "interval": [round(x, 6) for x in found["interval"]],
            "problems": found["n"], "samples": found["samples"],
        }  # fmt: skip


def _evaluation(recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The trainer's own numbers on held-out rows."""
    sources = [s["path"] for s in recipe.get("eval_dataset") or []]
    names = [path if _is_hub_id(path) else Path(path).name for path in sources]
    dataset = " + ".join(names) or "held-out rows of the training data"
    for key, value in metrics.items():
        plain = key.removeprefix("eval_")
        if plain == key or "/" in key or key.endswith(("_low", "_high")) or not isinstance(value, int | float):
            continue
        ends = [metrics.get(f"{key}_low"), metrics.get(f"{key}_high")]
        interval = [round(x, 6) for x in ends if x is not None]
        yield {
            "dataset": dataset, "metric": plain, "value": round(value, 6), "label": plain,
            "interval": interval if len(interval) == 2 else None,
        }  # fmt: skip


def _metrics(run: Path | None, step: int | None) -> dict[str, Any]:
    rows = read_metrics(run / "metrics.jsonl") if run else iter(())
    return next((row for row in rows if row["step"] == step), {})


def _opening(base: str, summary: Mapping[str, Any], step: int | None, *, adapter: bool, scores: bool) -> str:
    what = "a reward model" if scores else "a language model"
    origin = _origin(base)
    named = f"[{origin}](https://huggingface.co/{origin})" if origin else f"`{_shown(base)}`"
    if not summary:
        return f"This is {what}{', an adapter of ' + named if adapter else ''}. How it was trained is not recorded with it.\n"
    kind = _KINDS.get(summary["kind"], summary["kind"])
    at = f", step {step} of {summary['total_steps']}" if step is not None else ""
    form = f"an adapter of {named}" if adapter else f"{what}, from {named}"
    return f"This is {form}: {kind}{at}, by llmrl.\n"


def _loading(name: str, base: str, adapter: Mapping[str, Any], scores: bool, not_for_vllm: str) -> str:
    auto = f"AutoModelFor{'SequenceClassification' if scores else 'CausalLM'}"
    labels = ", num_labels=1" if scores and adapter else ""
    lines = [
        "## Loading it\n",
        f"`{name}` stands for this directory, or for its name on the hub.\n",
        "```python",
        f"from transformers import {auto}, AutoTokenizer\n",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = {auto}.from_pretrained("{name}"{labels}){"  # needs peft; loads the base too" if adapter else ""}',
        "```\n",
    ]
    runner = " --runner pooling" if scores else ""
    if not_for_vllm or (adapter and scores):
        lines.append(f"vLLM does not take this adapter ({not_for_vllm or 'a score layer'}): merge it first.\n")
    elif adapter:
        rank = max([adapter.get("r") or 1, *(adapter.get("rank_pattern") or {}).values()])
        command = (
            f"vllm serve {_shown(base)} --enable-lora --max-lora-rank {_served_rank(rank)} --lora-modules tuned={name}"
        )
        lines.append(f"```bash\n{command}\n```\n")
    else:
        lines.append(f"```bash\nvllm serve {name}{runner}\n```\n")
    return "\n".join(lines)


def _served_rank(rank: int) -> int:
    """The least `--max-lora-rank` that vLLM knows and that holds the adapter's."""
    return next((r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def _training(recipe: Mapping[str, Any], summary: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    data = ", ".join(
        f"[{s['path']}](https://huggingface.co/datasets/{s['path']})"
        if _is_hub_id(s["path"])
        else f"`{_shown(s['path'])}`"
        for s in recipe.get("dataset") or []
    )
    rows = {
        "Method": " ".join(str(v) for v in (summary["kind"], recipe.get("preset"), recipe.get("loss_type")) if isinstance(v, str)),
        "Started from": f"`{_shown(str(recipe.get('model_name_or_path')))}`",
        "Data": data or "handed over in Python",
        "Tokens trained on": f"{metrics['num_tokens']:,}" if "num_tokens" in metrics else "",
        "Learning rate, batch size": f"{recipe.get('learning_rate')}, {recipe.get('batch_size')}" if "batch_size" in recipe else "",
    }  # fmt: skip
    return "## Training\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in rows.items() if v)


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    lines = ["## Results\n", "| on | what | value | 95% interval | problems |", "|---|---|---|---|---|"]
    for r in results:
        interval = "{:.4g} to {:.4g}".format(*r["interval"]) if r.get("interval") else ""
        lines.append(f"| {r['dataset']} | {r['label']} | {r['value']:.4g} | {interval} | {r.get('problems', '')} |")
    return "\n".join(lines) + "\n"


def _recipe(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    text = yaml.safe_dump(_public(recipe), sort_keys=False, allow_unicode=True, width=120)
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return (
        "## Recipe\n\nEvery key, as it was; of paths on the machine the last part.\n\n"
        f"<details><summary>config.yaml</summary>\n\n{fence}yaml\n{text}{fence}\n\n</details>\n"
    )


def _environment(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    versions = ", ".join(f"{k} {v}" for k, v in (summary.get("versions") or {}).items())
    kind = f" Weights: {config['dtype']}." if config.get("dtype") else ""
    return f"## Environment\n\n{summary.get('processes')} process(es) on {summary.get('device')}; {versions}.{kind}\n"


def _origin(name: str) -> str | None:
    """The hub id that a model comes from: through adapters, cards and runs to what those started from; None where that is not known."""
    seen: set[Path] = set()
    while not _is_hub_id(name):
        path = Path(name).expanduser().resolve()
        if path in seen:
            return None
        seen.add(path)
        found = _json(path / "adapter_config.json").get("base_model_name_or_path") or _card_of(path).get("base_model")
        for recipe in (
            path.parent / "config.yaml",
            path.parent.parent.parent / "config.yaml",
        ):  # of model/, checkpoints/*/model/
            if found is None and recipe.is_file():
                found = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("model_name_or_path")
        if not isinstance(found, str):
            return None
        name = found
    return name


def _card_of(directory: Path) -> dict[str, Any]:
    file = directory / "README.md"
    matter = re.match(r"---\n(.*?)\n---\n", file.read_text(encoding="utf-8"), re.DOTALL) if file.is_file() else None
    return (yaml.safe_load(matter[1]) or {}) if matter else {}


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_FILES) and not Path(name).exists()


def _shown(name: str) -> str:
    """A card is published: of a path on this machine it has the end."""
    if not _LOCAL.fullmatch(name):
        return name
    path = Path(name)
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return _shown(_CREDENTIALS.sub("//", value)) if isinstance(value, str) else value


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
