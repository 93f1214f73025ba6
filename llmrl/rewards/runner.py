"""Scores rollouts with several reward functions: each in its place, under its deadline, with an outcome for every row."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from llmrl.config.reward import RewardSpec
from llmrl.config.rubric import JudgeSettings
from llmrl.errors import ConfigError, RewardError
from llmrl.rewards.batch import accepted_columns, columns_of, sendable_columns
from llmrl.rewards.combine import Combination
from llmrl.rewards.inline import InlineRunner
from llmrl.rewards.load import bind, default_name, is_builtin, resolve
from llmrl.rewards.pool import WorkerPool
from llmrl.rewards.session import RewardFunction, ScoringSession
from llmrl.rewards.tally import Tally
from llmrl.types import Judge, Prompt, Rollout, ScoredRollout

if TYPE_CHECKING:
    from llmrl.rewards.judged import JudgedReward

ROW_SECONDS, BATCH_SECONDS, CALLABLE_SECONDS = 10.0, 60.0, 300.0
ROW_MEMORY_GB = 4.0
# What the runner asks of a function's description, answered for a reward model.
_MODEL: Mapping[str, Any] = {
    "rowwise": False, "is_async": False, "checks_gold": False, "any_keyword": False, "names": (), "columns": (),
}  # fmt: skip


@dataclass(frozen=True)
class BadGold:
    """A prompt whose reference answer a verifier can't use."""

    prompt_id: str
    function: str
    reason: str


class RewardRunner:
    """Loads reward functions once and scores rollouts with them.

    specs: from a recipe. reward_funcs: TRL's argument: callables (they run in this process), names, a `JudgedReward`, or (one, weight) pairs.
    on_error, workers, allow_code_execution, combine, gate_threshold: see `llmrl.config.reward.RewardFields`. Reward models are loaded on `device`.
    make_judge: makes the judges that have no base_url (`llmrl.evaluation.judges.LocalJudges`). Raises ConfigError and RewardError for what can't
    be loaded.

    Example:
        with RewardRunner([RewardSpec(function="math_answer")], on_error="stop", workers=2) as rewards:
            scored = rewards.score(rollouts, {"global_step": 3})
    """

    def __init__(
        self, specs: Sequence[RewardSpec], *, reward_funcs: Any = (), on_error: Literal["stop", "skip"] = "stop", workers: int = 2,
        device: str = "cpu", allow_code_execution: bool = False,
        combine: Combination = "sum", gate_threshold: float = 0.5, make_judge: Callable[[JudgeSettings], Judge] | None = None,
    ) -> None:  # fmt: skip
        self._on_error, self._workers, self._device, self._make_judge = on_error, workers, device, make_judge
        self._allow_code = allow_code_execution
        self._combine: Combination = combine
        self._gate_threshold = gate_threshold
        self._inline, self._here = InlineRunner(), threading.Lock()
        self._functions: list[RewardFunction] = []
        # Also when nobody calls close(): the workers end with this object, or with the interpreter.
        self._finalizer = weakref.finalize(self, _close_all, self._functions, self._inline)
        try:
            for spec in specs:
                self._functions.append(self._load(spec))
            for item in _as_list(reward_funcs):
                self._functions.append(self._adopt(item))
            self._check_names()
            if combine == "gated" and len(self._functions) < 2:
                raise ConfigError(
                    f"combine: gated needs at least two rewards, of which the first is the gate; given {', '.join(self.names) or 'none'}"
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and lets go of reward models. May be called twice."""
        self._make_judge = None
        self._finalizer()

    @property
    def names(self) -> list[str]:
        return [f.name for f in self._functions]

    @property
    def weights(self) -> list[float]:
        """The weights at step 0."""
        return [f.weight_at(0) for f in self._functions]

    def score(
        self,
        rollouts: Sequence[Rollout],
        trainer_state: Mapping[str, Any] | None = None,
        tally: Tally | None = None,
    ) -> list[ScoredRollout]:
        """The rollouts with their rewards, in order. Raises RewardError as `on_error` says, ConfigError for a missing column.

        What is counted goes into `tally`.
        """
        with self.session([r.prompt for r in rollouts], trainer_state, tally) as session:
            return [row for group in session.finish([[r] for r in rollouts]) for row in group]

    def session(
        self, prompts: Sequence[Prompt], trainer_state: Mapping[str, Any] | None = None, tally: Tally | None = None
    ) -> ScoringSession:
        """For scoring groups of these prompts as they are finished; see `ScoringSession`. Any number may be open, in any threads.

        What is counted goes into `tally`. Raises ConfigError for a missing column.
        """
        if not self._finalizer.alive:
            raise RewardError("this reward runner is closed; make a new one")
        self._check_rows(prompts)
        return ScoringSession(
            self._functions,
            self._inline,
            self._here,
            prompts,
            trainer_state,
            Tally() if tally is None else tally,
            stop=self._on_error == "stop",
            combine=self._combine,
            gate_threshold=self._gate_threshold,
        )

    def check_golds(self, prompts: Sequence[Prompt]) -> list[BadGold]:
        """The prompts whose reference answer some verifier can't use; nothing is raised for them.

        Also raises ConfigError when a function needs a column that no row has: call it before training.
        """
        bad: list[BadGold] = []
        columns = columns_of(prompts)
        self._check_rows(prompts)
        for function in self._functions:
            accepted = accepted_columns(columns, function.name, function.description) if prompts else {}
            if function.judge is not None:  # of a hybrid, too: the judge may read a reference that the rule can't
                judged = [(p.id, function.judge.problem(p)) for p in prompts]
                bad += [BadGold(row, function.name, why) for row, why in judged if why is not None]
                continue
            if not function.description["checks_gold"]:
                continue
            if function.bound is not None:
                check = function.bound.check_gold
                problems = [check({k: v[i] for k, v in accepted.items()}) for i in range(len(prompts))]
            else:
                assert function.pool is not None
                accepted = sendable_columns(accepted, function.name, function.description)
                tasks = [{"check": {k: v[i] for k, v in accepted.items()}} for i in range(len(prompts))]
                problems = function.pool.run(
                    tasks,
                    function.seconds,
                    lambda m: m["result"]["problem"],
                    lambda n, kind, detail: f"{kind}: {detail}",
                    retries=1,
                )
            bad += [
                BadGold(p.id, function.name, why) for p, why in zip(prompts, problems, strict=True) if why is not None
            ]
        return bad

    def _load(self, spec: RewardSpec) -> RewardFunction:
        if spec.model:
            from llmrl.rewards.learned import LearnedReward  # here, since it takes torch

            name = spec.name or "+".join(map(_model_name, spec.model))
            return RewardFunction(name, spec.weight, 0.0, _MODEL, model=LearnedReward(spec, self._device))
        if spec.judge is not None and not spec.function:
            name = spec.name or (PurePath(spec.rubric).stem if spec.rubric else "rubric")
            return RewardFunction(name, spec.weight, 0.0, _MODEL, judge=self._judged(spec, name))
        name = spec.name or default_name(spec.function)
        judge = None if spec.judge is None else self._judged(spec, name)
        bound = (
            resolve(spec.function, spec.args, name) if is_builtin(spec.function) or spec.isolate == "inline" else None
        )
        if bound is not None:
            self._check_code(name, bound.describe())
        here = spec.isolate == "inline" or (bound is not None and bound.describe()["safe"] and spec.isolate is None)
        if here:
            assert bound is not None
            pool, description = None, bound.describe()
        else:
            pool = self._start_pool(spec, name)
            description = pool.description
            try:
                self._check_code(name, description)
            except ConfigError:
                pool.close()
                raise
            if description["rowwise"]:
                pool.grow(self._workers)
        # The long deadline of a mixture is for its code.
        own = None if description["by_row"] and not self._allow_code else description["seconds"]
        seconds = spec.timeout or own or (ROW_SECONDS if description["rowwise"] else BATCH_SECONDS)
        return RewardFunction(name, spec.weight, seconds, description, bound if here else None, pool, judge=judge)

    def _judged(self, spec: RewardSpec, name: str) -> JudgedReward:
        from llmrl.rewards.judged import JudgedReward  # here, since most runs have no judge

        assert spec.judge is not None
        if spec.judge.base_url is not None:
            return JudgedReward(spec, name)
        if self._make_judge is None:
            raise ConfigError(
                f"the judge of reward {name!r} has no base_url, and nothing here loads {spec.judge.model!r}: give the URL of its server, or "
                "RewardRunner(..., make_judge=LocalJudges()) of llmrl.evaluation.judges"
            )
        return JudgedReward(spec, name, self._make_judge(spec.judge))

    def _check_code(self, name: str, description: Mapping[str, Any]) -> None:
        if description["runs_code"] and not self._allow_code:
            raise ConfigError(
                f"reward function {name!r} runs programs that the model wrote, in a sandbox that is no boundary against a determined "
                "attacker (docs/code.md). If this machine may do that, say `allow_code_execution: true` in the recipe"
            )

    def _check_rows(self, prompts: Sequence[Prompt]) -> None:
        """What the rows' column `verifier` names must be there, and be allowed."""
        if any(f.description.get("by_row") for f in self._functions):
            from llmrl.rewards.verifier import check_rows  # here, since most runs have no mixture

            check_rows(columns_of(prompts), allow_code=self._allow_code)

    @staticmethod
    def _start_pool(spec: RewardSpec, name: str) -> WorkerPool:
        memory = {
            kind: None if gb is None else int(gb * 2**30)
            for kind, gb in (("row", spec.memory_gb or ROW_MEMORY_GB), ("batch", spec.memory_gb))
        }
        return WorkerPool({"target": spec.function, "args": spec.args, "name": name, "memory_bytes": memory}, 1)

    def _adopt(self, item: Any) -> RewardFunction:
        function, weight = item if isinstance(item, tuple) else (item, 1.0)
        if isinstance(function, RewardSpec):
            return self._load(function)
        if isinstance(function, str):
            return self._load(RewardSpec(function=function, weight=weight))
        if _is_judged(function):
            return RewardFunction(function.name, weight, 0.0, _MODEL, judge=function)
        if not callable(function):
            raise ConfigError(
                f"reward_funcs holds a {type(function).__name__}; expected a callable, a name, or a pair of one and its weight"
            )
        inner = function.func if isinstance(function, functools.partial) else function
        name = getattr(inner, "__name__", None) or type(inner).__name__
        bound = bind(function, {}, name, name)
        self._check_code(name, bound.describe())
        return RewardFunction(name, float(weight), CALLABLE_SECONDS, bound.describe(), bound)

    def _check_names(self) -> None:
        double = [name for name, count in Counter(self.names).items() if count > 1]
        if double:
            raise ConfigError(f"two reward functions are called {double[0]!r}; give one of them another `name`")


def _as_list(reward_funcs: Any) -> list[Any]:
    """TRL takes one function or several; a tuple that ends in a number is one (function, weight) pair."""
    if reward_funcs is None:
        return []
    pair = isinstance(reward_funcs, tuple) and len(reward_funcs) == 2 and isinstance(reward_funcs[1], int | float)
    return list(reward_funcs) if isinstance(reward_funcs, list | tuple) and not pair else [reward_funcs]


def _is_judged(item: Any) -> TypeGuard[JudgedReward]:
    """Whether it is a rubric with its judge, made in Python. Raises ConfigError for one that wants a rule first."""
    judged = sys.modules.get("llmrl.rewards.judged")  # who has made one has loaded it
    if judged is None or not isinstance(item, judged.JudgedReward):
        return False
    if item.hybrid:
        raise ConfigError(
            f"the spec of {item.name!r} has a function beside its judge; put such a spec into `rewards` of the recipe"
        )
    return True


def _model_name(model: str) -> str:
    """The name in metrics of a model: its directory's, or its run's where that is just `model`, as runs of llmrl write it."""
    path = PurePath(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _close_all(functions: list[RewardFunction], inline: InlineRunner) -> None:
    for function in functions:
        if function.pool is not None:
            function.pool.close()
        if function.judge is not None:
            function.judge.close()
        function.model = function.judge = None
    inline.close()
