"""The reward functions of a recipe, tried before training on answers that no model has to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrl.cli.plan import SamplingConfig
from llmrl.cli.recipe import heading
from llmrl.errors import DataError
from llmrl.evaluation.judges import LocalJudges
from llmrl.rewards.answer import gold_answer
from llmrl.rewards.runner import RewardRunner
from llmrl.train.launch import local_device
from llmrl.types import Completion, Prompt, Rollout, ScoredRollout

TRIED_ROWS, SEARCHED_ROWS, LISTED = 8, 100, 10


def open_rewards(config: SamplingConfig) -> RewardRunner:
    """The recipe's rewards; what fails is shown, and stops nothing."""
    return RewardRunner(
        config.rewards,
        on_error="skip",
        workers=config.reward_workers,
        device=local_device(),
        allow_code_execution=config.allow_code_execution,
        combine=config.combine,
        gate_threshold=config.gate_threshold,
        make_judge=LocalJudges(),
    )


def try_rewards(config: SamplingConfig, console: Console, prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    """Tries the rewards on the reference answers of a few rows, on a wrong answer and on an empty one."""
    problems: list[str] = []
    with open_rewards(config) as runner:
        bad = runner.check_golds(prompts)
        references = {p.id: gold for p in prompts[:SEARCHED_ROWS] if (gold := _reference(p)) is not None}
        chosen = [p for p in prompts if p.id in references or not references][:TRIED_ROWS]
        failures: list[str] = []
        variants = _answers([references.get(p.id) for p in chosen])
        heading(console, f"Rewards tried on {len(chosen)} rows (mean; no policy is involved)")
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("answer")
        for name, weight in zip(runner.names, runner.weights, strict=True):
            table.add_column(f"{name} x {weight:g}", justify="right")
        table.add_column("reward", justify="right")
        means: dict[str, float | None] = {}
        for variant, texts in variants.items():
            scored = runner.score(answered(chosen, texts, tokenizer))
            means[variant] = _mean([s.reward for s in scored])
            table.add_row(variant, *(_cell(scored, name) for name in runner.names), _number(means[variant]))
            if failures := _failures(scored, variant):
                break  # the other answers would only fail in the same way
        console.print(table)
    if config.on_error == "stop":
        problems += failures
    else:
        for failure in failures:
            console.print(Text(f"note: {failure}", style="yellow"))
    if all(mean is None for mean in means.values()):
        problems.append("no reward function gives any of these rows a reward")
    right, wrong = means.get("the reference, boxed"), means.get("a wrong one")
    if right is not None and wrong is not None and right <= wrong:
        console.print(Text("note: these rewards do not tell a reference answer from a wrong one", style="yellow"))
    if bad:
        console.print(
            Text(
                f"note: {len(bad)} of {len(prompts)} reference answers can't be verified; such rows get no reward:",
                style="yellow",
            )
        )
        for item in bad[:LISTED]:
            console.print(Text(f"  {item.prompt_id}, {item.function}: {item.reason}", style="yellow"))
    return problems


def _reference(prompt: Prompt) -> str | None:
    try:
        return gold_answer(prompt.columns, None)
    except DataError:
        return None


def _answers(references: Sequence[str | None]) -> dict[str, list[str]]:
    """Kind of answer -> one text a row."""
    out: dict[str, list[str]] = {}
    if None not in references:
        out["the reference, boxed"] = [f"The answer is \\boxed{{{gold}}}." for gold in references]
        out["the reference alone"] = [str(gold) for gold in references]
    out["a wrong one"] = ["The answer is \\boxed{-987654321}."] * len(references)
    out["an empty one"] = [""] * len(references)
    return out


def answered(prompts: Sequence[Prompt], texts: Sequence[str], tokenizer: Any) -> list[Rollout]:
    """One rollout a prompt, with an answer that no model has written."""
    out = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        out.append(Rollout(prompt, Completion(ids, (0.0,) * len(ids), "stop", text)))
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    given = [v for v in values if v is not None]
    return sum(given) / len(given) if given else None


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _cell(scored: Sequence[ScoredRollout], name: str) -> str:
    kinds = [s.outcomes[name] for s in scored]
    odd = {kind: kinds.count(kind) for kind in kinds if kind != "score"}
    text = _number(_mean([s.parts[name] for s in scored]))
    return text + "".join(f" ({count} {kind})" for kind, count in odd.items())


def _failures(scored: Sequence[ScoredRollout], variant: str) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for s in scored:
        for name, kind in s.outcomes.items():
            if kind not in ("score", "not-applicable"):
                counts[name, kind] = counts.get((name, kind), 0) + 1
    return [
        f"reward {name!r}: {n} of {len(scored)} rows ended in {kind!r} on {variant}"
        for (name, kind), n in counts.items()
    ]
