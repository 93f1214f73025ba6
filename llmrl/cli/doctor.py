"""`llmrl doctor KIND --config RECIPE [key=value ...]`: a run that must change nothing, to certify what a real one relies on."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from llmrl.cli.recipe import heading, read_recipe, wants_help
from llmrl.errors import ConfigError, LLMRLError

if TYPE_CHECKING:
    from llmrl.train.backend import Backend

KINDS = ("ppo", "grpo", "dpo")
STEPS = 3
_USAGE = f"""usage: llmrl doctor {"|".join(KINDS)} --config RECIPE [key=value ...]

Trains {STEPS} steps at learning rate 0 with the recipe's own model, data, rewards and rollout engine, in a directory of its own that is
removed, and reports what must hold before a long run: the processes can talk, the engine is reachable and holds the same model, takes the
weights, samples with them, and its log-probs equal the trainer's within max_logprob_gap at every step without drifting.
Start it the way the run is started (alone, `--accelerate FILE`, `torchrun`). Exit code 1: something failed."""

_GAP = "sampling/sampling_logp_difference/mean"


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it holds (None: nothing to compare), and the numbers."""

    what: str
    holds: bool | None
    detail: str


def run(argv: Sequence[str]) -> int:
    """Prints the findings; 0, or 1 when one of them fails."""
    if wants_help(argv):
        print(_USAGE)
        return 0
    if not argv or argv[0] not in KINDS:
        raise ConfigError(
            f"say which kind of recipe it is, {', '.join(KINDS)}: `llmrl doctor grpo --config R` (the others sample nothing; "
            "`llmrl check` looks at their recipes)"
        )
    config = read_recipe(argv[0], argv[1:])
    if argv[0] == "dpo" and not config.rewards:  # type: ignore[attr-defined]
        raise ConfigError(
            "this DPO recipe has no rewards, so it is offline and samples nothing; `llmrl check dpo` looks at it"
        )
    findings, main = examine(config)
    if main:
        report(findings, Console(highlight=False))
    return 0 if all(f.holds is not False for f in findings) else 1


def examine(config: Any) -> tuple[list[Finding], bool]:
    """(findings, whether this is the first process). The error that ended the null run, if one did, is a finding as well."""
    # Beside the run's own directory: servers on other machines may have to read the weights there.
    parent = Path(config.output_dir).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="llmrl-doctor-", dir=parent))
    changes = {
        "learning_rate": 0.0,
        "max_steps": STEPS,
        "output_dir": str(directory / "run"),
        "resume": "never",
        "save_steps": None,
        "eval_steps": None,
        "report_to": [],
        "num_samples_logged": 0,
    }
    # Every completion is compared, those too that training would leave out.
    neutral = {"critic_learning_rate": None, "group_filter": "none", "truncated_completions": "keep"}
    changes |= {key: value for key, value in neutral.items() if key in type(config).model_fields}
    try:
        return _null_run(type(config).model_validate({**config.model_dump(), **changes}))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _null_run(config: Any) -> tuple[list[Finding], bool]:
    trainer_class = _trainer_of(config.kind)
    rows: list[dict[str, Any]] = []
    try:
        trainer = trainer_class(config, callbacks=[_Collect(rows)])
    except LLMRLError as error:
        return [Finding("set-up", False, str(error))], os.environ.get("RANK", "0") == "0"
    findings = [_processes(trainer.backend)]
    before = _digest(trainer)
    try:
        trainer.train()
    except LLMRLError as error:
        findings.append(Finding("null run", False, f"stopped at step {len(rows) + 1} of {STEPS}: {error}"))
    else:
        findings.append(Finding("null run", True, f"{len(rows)} steps, {sum(r['step_time'] for r in rows):.1f} s"))
        after = _digest(trainer)
        findings.append(
            Finding("weights", after == before, f"digest {before} before, {after} after, at learning rate 0")
        )
    return [*findings, *_engine(trainer, rows)], trainer.backend.is_main


def _trainer_of(kind: str) -> Any:
    from llmrl.algorithms.dpo import DPOTrainer
    from llmrl.algorithms.grpo import GRPOTrainer
    from llmrl.algorithms.ppo import PPOTrainer

    return {"dpo": DPOTrainer, "ppo": PPOTrainer, "grpo": GRPOTrainer}[kind]


class _Collect:
    """Callback: keeps the numbers of each step."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        self.rows.append(dict(metrics))


def _processes(backend: Backend) -> Finding:
    """Sum, maximum, gather and broadcast over the processes, against what they must give."""
    n, rank = backend.world_size, backend.rank
    began = time.monotonic()
    right = (
        backend.global_sum([rank + 1.0]) == [n * (n + 1) / 2]
        and backend.global_max(rank) == n - 1
        and backend.gather_json(rank) == list(range(n))
        and backend.broadcast_json({"from": rank}) == {"from": 0}
    )
    backend.barrier()
    took = time.monotonic() - began
    return Finding(
        "processes", right, f"{n} on {backend.device.type}; sum, max, gather, broadcast, barrier in {took:.3f} s"
    )


def _digest(trainer: Any) -> str:
    from llmrl.rollout.fingerprint import fingerprint

    return fingerprint(tensor for _, tensor in trainer.backend.policy_weights()).hex


def _engine(trainer: Any, rows: Sequence[dict[str, Any]]) -> list[Finding]:
    settings, bound = trainer.config.rollout, trainer.rollouts.gap_bound
    where = ", ".join(settings.urls) or "this process"
    name = f"{settings.engine} ({where})"
    if not rows:
        return [Finding("engine", None, f"{name}: no step was finished, so nothing was compared")]
    gaps = [r[_GAP] for r in rows if _GAP in r]
    findings = [Finding("engine", True, name), _compare("log-probs of rollouts", gaps, bound)]
    canaries = [r["sampling/canary_gap"] for r in rows if "sampling/canary_gap" in r]
    if canaries:
        findings.append(_compare("log-probs of fixed tokens", canaries, bound))
        last = rows[-1]
        moved = (
            f"{last['sync/tensors']:.0f} tensors, {last['sync/bytes'] / 2**20:.1f} MiB in {last['sync/seconds']:.2f} s"
        )
        findings.append(
            Finding("weight sync", True, f"{moved}, each proved by count, digest, version and fixed tokens")
        )
    return findings


def _compare(what: str, gaps: Sequence[float], bound: float) -> Finding:
    """Within the bound, and not growing: at learning rate 0 nothing moves, so a gap that grows is an engine's state that drifts."""
    if not gaps:
        return Finding(what, None, "no step had a completion to learn from, so nothing was compared")
    drifts = len(gaps) > 1 and gaps[-1] > max(4 * gaps[0], bound / 10)
    shown = ", ".join(f"{gap:.2g}" for gap in gaps)
    detail = f"mean |engine - trainer| {shown} nats at steps 1 to {len(gaps)}; bound {bound:.2g}"
    return Finding(what, all(gap <= bound for gap in gaps) and not drifts, detail + ("; it grows" if drifts else ""))


def report(findings: Sequence[Finding], console: Console) -> None:
    heading(console, f"Null run: {STEPS} steps at learning rate 0")
    marks = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("-", "dim")}
    for finding in findings:
        mark, style = marks[finding.holds]
        console.print(Text.assemble((f"{mark:<6}", style), f"{finding.what}: {finding.detail}"))
