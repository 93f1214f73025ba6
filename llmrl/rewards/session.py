"""The scoring of one call's groups, which may begin while some of them are still being sampled."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llmrl.config.reward import WeightSchedule
from llmrl.errors import RewardError
from llmrl.rewards.base import FAILURES, TIMEOUT, Outcome, Result
from llmrl.rewards.batch import RewardInputs
from llmrl.rewards.call import BoundFunction
from llmrl.rewards.combine import Combination, combine_group
from llmrl.rewards.inline import InlineRunner
from llmrl.rewards.pool import Work, WorkerPool
from llmrl.rewards.tally import Tally
from llmrl.types import Prompt, Rollout, ScoredRollout

if TYPE_CHECKING:
    from llmrl.rewards.judged import JudgedReward, Judging
    from llmrl.rewards.learned import LearnedReward

logger = logging.getLogger("llmrl.rewards")

LOGGED_FAILURES = 3
# Under `on_error: stop`: a hostile answer must not end a run, a verifier that fails on most rows must.
TOLERATED_SHARE, ALWAYS_TOLERATED = 0.5, 3


@dataclass
class RewardFunction:
    """One reward function of a run. Exactly one of `bound` (it runs here), `pool` (in workers) and `model` is set, or `judge`
    alone; a `judge` beside a function is asked where the function says no."""

    name: str
    weight: float | WeightSchedule
    seconds: float
    description: Mapping[str, Any]
    bound: BoundFunction | None = None
    pool: WorkerPool | None = None
    model: LearnedReward | None = None
    judge: JudgedReward | None = None

    def weight_at(self, step: int) -> float:
        return self.weight if isinstance(self.weight, int | float) else self.weight.at(step)


_Row = tuple[int, int]
"""A group's number and a sample's place in it."""


@dataclass
class _Call:
    """A function in one session, with the columns that it takes and what its workers were given."""

    function: RewardFunction
    columns: Mapping[str, list[Any]]
    works: list[tuple[list[_Row], Work[Result]]] = field(default_factory=list)
    judging: Judging | None = None
    blamed: bool = False  # set in the pool's thread, as `error` is
    error: BaseException | None = None

    @property
    def streams(self) -> bool:
        return self.function.pool is not None and bool(self.function.description["rowwise"])

    def known(self) -> list[tuple[_Row, Result]]:
        """The rows that are scored by now, in order."""
        found = [(row, work.results[n]) for rows, work in self.works for n, row in enumerate(rows) if n in work.results]
        return sorted(found, key=lambda pair: pair[0])

    def seconds(self) -> float:
        """How long the workers had something to do, once they are done."""
        total, until = 0.0, 0.0
        for _, work in self.works:  # in the order of `begun`
            total += max(0.0, work.ended - max(work.begun, until))
            until = max(until, work.ended)
        return total


class ScoringSession:
    """Scores the groups of `prompts` (`RewardRunner.session`), as a context that leaves no work behind.

    Row verifiers in workers begin with a group when it is added. Everything else is called once, with all groups in order, by
    `finish`; so are the error policy and the counts about all rows, and the result is the same whenever and in whatever order groups
    were added. Functions in this process run for one session at a time.

    Example:
        with runner.session(prompts, {"global_step": 3}) as session:
            scored = session.finish(engine.generate(prompts, 8, sampling, on_group=session.add))
    """

    def __init__(
        self, functions: Sequence[RewardFunction], inline: InlineRunner, here: threading.Lock, prompts: Sequence[Prompt],
        trainer_state: Mapping[str, Any] | None, tally: Tally, *, stop: bool,
        combine: Combination = "sum", gate_threshold: float = 0.5,
    ) -> None:  # fmt: skip
        self._combine: Combination = combine
        self._gate_threshold = gate_threshold
        self._inline, self._here, self._tally, self._stop = inline, here, tally, stop
        self._inputs = RewardInputs(prompts, trainer_state)
        tally.expect([f.name for f in functions])
        self._calls = [
            _Call(f, self._inputs.columns(f.name, f.description, send=f.pool is not None) if prompts else {})
            for f in functions
        ]
        for call in self._calls:
            call.judging = None if call.function.judge is None else call.function.judge.open(prompts)
        self._count = len(prompts)
        self._added: dict[int, Sequence[Rollout]] = {}
        self._lock, self._over = threading.Lock(), False

    def __enter__(self) -> ScoringSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._over = True
        for call in self._calls:
            for _, work in call.works:
                assert call.function.pool is not None
                call.function.pool.cancel(work)
            if call.judging is not None:
                call.judging.cancel()

    def add(self, index: int, group: Sequence[Rollout]) -> None:
        """Takes the finished group of prompt number `index` (an `OnGroup`); returns at once.

        Raises RewardError when a function has failed meanwhile, in a way that stops the run whatever the other rows get.
        """
        self._raise_failure()
        self._take({index: group})

    def finish(self, groups: Sequence[Sequence[Rollout]]) -> list[list[ScoredRollout]]:
        """The groups of all prompts with their rewards. Those that were not added are scored now; raises RewardError as `on_error` says."""
        if len(groups) != self._count:
            raise RewardError(f"{len(groups)} groups for {self._count} prompts")
        changed = [i for i, group in self._added.items() if groups[i] != group]
        if changed:
            raise RewardError(
                f"the engine returned another group for prompt {groups[changed[0]][0].prompt.id!r} than the one that it had announced"
            )
        self._raise_failure()
        rollouts = [r for group in groups for r in group]
        if not rollouts:
            return [[] for _ in groups]
        self._take({i: group for i, group in enumerate(groups) if i not in self._added})
        results = self._results(groups)
        for call, result in zip(self._calls, results, strict=True):
            self._account(call.function, result, rollouts)
        return self._scored(groups, results)

    def _take(self, groups: Mapping[int, Sequence[Rollout]]) -> None:
        """Hands the rows of these groups to the workers of row verifiers and to judges."""
        with self._lock:
            if self._over:
                raise RewardError("this scoring session is over")
            twice = [i for i in groups if i in self._added]
            if twice:
                raise RewardError(f"the group of prompt number {twice[0]} was added twice")
            self._added.update(groups)
            for call in self._calls:
                for index, group in groups.items():
                    if call.judging is not None:
                        call.judging.add(index, group)
                if call.streams and groups:
                    description = call.function.description
                    parts = [self._inputs.row_tasks(i, g, call.columns, description) for i, g in groups.items()]
                    rows = [(i, n) for i, group in groups.items() for n in range(len(group))]
                    self._send(call, rows, [task for part in parts for task in part])

    def _send(self, call: _Call, rows: list[_Row], tasks: Sequence[Mapping[str, Any]]) -> None:
        function, rowwise = call.function, call.streams
        assert function.pool is not None

        def answer(message: Mapping[str, Any]) -> Result:
            result = Result.from_json(message["result"]).timed(message["seconds"])
            call.blamed |= any(_is_blamed(o) for o in result.outcomes)
            return result

        def failure(number: int, kind: str, detail: str) -> Result:
            result = Result.failed(kind, detail, tasks[number]["rows"], row_caused=rowwise)
            return result.timed(function.seconds) if kind == TIMEOUT else result

        def note(future: Future[Any]) -> None:
            call.error = call.error or (None if future.cancelled() else future.exception())

        # A row can be scored again in a new worker if its own died (killed from outside, perhaps); a batch call may have had effects.
        work = function.pool.start(tasks, function.seconds, answer, failure, retries=1 if rowwise else 0)
        call.works.append((rows, work))
        work.future.add_done_callback(note)

    def _raise_failure(self) -> None:
        """Raises what, by now, is known to stop the run."""
        for call in self._calls:
            if call.error is not None:
                raise call.error
            known = call.known() if self._stop and call.blamed else []
            if any(_is_blamed(o) for _, result in known for o in result.outcomes):
                self._account(call.function, _merge([r for _, r in known]), [self._added[i][n] for (i, n), _ in known])

    def _results(self, groups: Sequence[Sequence[Rollout]]) -> list[Result]:
        """One result a function: worker functions and async functions at the same time, sync ones here one after another."""
        for call in self._calls:
            if call.function.pool is not None and not call.streams:
                self._send(call, [], [self._inputs.batch_task(groups, call.columns, call.function.description)])
        with self._here:
            results = self._run_here(groups)
        done, _ = wait([w.future for call in self._calls for _, w in call.works], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        for call in self._calls:
            if call.function.pool is not None:
                known = [r for _, r in call.known()]
                results[call.function.name] = _merge(known) if call.streams else call.works[0][1].results[0]
                self._tally.spend(call.function.name, call.seconds())
        for call in self._calls:
            if call.judging is not None:
                name = call.function.name
                results[name] = call.judging.finish(groups, results.get(name))
                self._tally.spend(name, call.judging.seconds)
        return [results[call.function.name] for call in self._calls]

    def _run_here(self, groups: Sequence[Sequence[Rollout]]) -> dict[str, Result]:
        finishers: list[tuple[str, float | None, Callable[[], Result]]] = []
        for call in self._calls:
            bound, description = call.function.bound, call.function.description
            if description["is_async"] and bound is not None:
                task = self._inputs.batch_task(groups, call.columns, description)
                begun = time.monotonic()
                finishers.append((call.function.name, begun, self._inline.start(bound, task, call.function.seconds)))
            elif bound is not None or call.function.model is not None:
                finishers.append((call.function.name, None, partial(self._run_sync, call, groups)))
        results = {}
        for name, started, finish in finishers:
            begun = time.monotonic() if started is None else started
            results[name] = finish()
            seconds = time.monotonic() - begun
            self._tally.spend(name, seconds)
            if not results[name].seconds:
                results[name].timed(seconds)
        return results

    def _run_sync(self, call: _Call, groups: Sequence[Sequence[Rollout]]) -> Result:
        bound, description, seconds = call.function.bound, call.function.description, call.function.seconds
        if call.function.model is not None:
            return Result(call.function.model.outcomes([r for group in groups for r in group]))
        assert bound is not None
        if not description["rowwise"]:
            return self._inline.run(bound, self._inputs.batch_task(groups, call.columns, description), seconds)
        tasks = [
            t for i, group in enumerate(groups) for t in self._inputs.row_tasks(i, group, call.columns, description)
        ]
        run = bound.run if description["safe"] else partial(self._inline.run, bound, seconds=seconds)
        results = []
        for task in tasks:
            begun = time.perf_counter()
            results.append(run(task).timed(time.perf_counter() - begun))
        return _merge(results)

    def _scored(self, groups: Sequence[Sequence[Rollout]], results: Sequence[Result]) -> list[list[ScoredRollout]]:
        functions = [call.function for call in self._calls]
        step = int(self._inputs.trainer_state.get("global_step") or 0)
        weights = [f.weight_at(step) for f in functions]
        self._tally.weigh(
            {f.name: w for f, w in zip(functions, weights, strict=True) if isinstance(f.weight, WeightSchedule)}
        )
        scored, end = [], 0
        for group in groups:
            places = range(end, end + len(group))
            end += len(group)
            rows = [[r.outcomes[i].value for r in results] for i in places]
            rewards = combine_group(rows, weights, self._combine, self._gate_threshold)
            scored.append(
                [
                    ScoredRollout(
                        rollout=rollout,
                        reward=reward,
                        parts={f.name: r.outcomes[i].value for f, r in zip(functions, results, strict=True)},
                        outcomes={f.name: r.outcomes[i].kind for f, r in zip(functions, results, strict=True)},
                        extra={column: values[i] for r in results for column, values in r.extra.items()},
                        seconds={
                            f.name: s
                            for f, r in zip(functions, results, strict=True)
                            if (s := _second(r, i)) is not None
                        },
                        notes={f.name: n for f, r in zip(functions, results, strict=True) if (n := r.outcomes[i].note)},
                    )
                    for i, rollout, reward in zip(places, group, rewards, strict=True)
                ]
            )
        return scored

    def _account(self, function: RewardFunction, result: Result, rollouts: Sequence[Rollout]) -> None:
        """Counts, logs, and raises where the policy says so."""
        self._tally.count(function.name, result)
        failed = [(r, o) for r, o in zip(rollouts, result.outcomes, strict=True) if o.kind in FAILURES]
        one_reason = len(failed) == len(rollouts) and len({o.detail for _, o in failed}) == 1  # a call that failed
        shown = failed[: 1 if one_reason else LOGGED_FAILURES]
        for rollout, outcome in shown:
            logger.warning("%s", _report(function.name, rollout, outcome))
        if len(failed) > len(shown):
            logger.warning(
                "reward function %r: %d more rows failed in this call", function.name, len(failed) - len(shown)
            )
        if not self._stop or not failed:
            return
        blamed = [(r, o) for r, o in failed if _is_blamed(o)]
        most = len(failed) > max(ALWAYS_TOLERATED, TOLERATED_SHARE * len(rollouts))
        if blamed or most:
            rollout, outcome = (blamed or failed)[0]
            raise RewardError(
                f"{_report(function.name, rollout, outcome)}\n{len(failed)} of {len(rollouts)} rows failed. Repair the function, raise its "
                "`timeout`, or set `on_error: skip` to train without the rewards of such rows"
            )


def _is_blamed(outcome: Outcome) -> bool:
    """Whether it is a failure, and the function's own."""
    return outcome.kind in FAILURES and not outcome.row_caused


def _merge(results: Sequence[Result]) -> Result:
    """Results of one row each as one; a column that only some rows logged is None in the others."""
    columns = dict.fromkeys(name for r in results for name in r.extra)
    extra = {name: [r.extra.get(name, [None])[0] for r in results] for name in columns}
    seconds = [_second(r, 0) for r in results]
    return Result([r.outcomes[0] for r in results], extra, [m for r in results for m in r.metrics], seconds)


def _second(result: Result, row: int) -> float | None:
    return result.seconds[row] if result.seconds else None


def _report(name: str, rollout: Rollout, outcome: Outcome) -> str:
    start = rollout.completion.text[:200]
    return (
        f"reward function {name!r}: {outcome.kind} on row {rollout.prompt.id!r}, sample {rollout.index}: {outcome.detail}\n"
        f"its completion begins {start!r}"
    )
