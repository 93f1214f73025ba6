"""A rubric and its judge as a reward of a run: groups are sent to the judge as they are finished, while others are still sampled."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from llmrl.config.reward import RewardSpec
from llmrl.config.rubric import Rubric
from llmrl.errors import ConfigError, DataError
from llmrl.rewards.answer import gold_answer
from llmrl.rewards.base import ERROR, Outcome, Result
from llmrl.rewards.grader import Counts, Graded, Grader, Question
from llmrl.rewards.hybrid import EQUIVALENCE, acceptable, says_no
from llmrl.rewards.inline import AsyncThread
from llmrl.rewards.judge import OpenAIJudge
from llmrl.rewards.judge_budget import Meter, MeteredJudge
from llmrl.rewards.judge_cache import JudgeCache
from llmrl.rewards.rubric import load_rubric, row_rubric, shown_prompt
from llmrl.types import Judge, Prompt, Rollout


class JudgedReward:
    """Grades rollouts by the rubric of a spec (a file, or a column of the data) with its judge.

    judge: who is asked, where the spec names no endpoint. Raises ConfigError where rubric, key or cache can't be used.

    Example: JudgedReward(RewardSpec(rubric="rubric.yaml", judge=JudgeSettings(base_url="http://127.0.0.1:8000", model="m")))
    """

    def __init__(self, spec: RewardSpec, name: str, judge: Judge | None = None) -> None:
        assert spec.judge is not None
        self.name, self.hybrid, self._column = name, bool(spec.function), spec.rubric_column
        self._rubric = load_rubric(spec.rubric) if spec.rubric else EQUIVALENCE if self.hybrid else None
        self._gold_column = spec.args.get("column") if self.hybrid else None
        self._cache = JudgeCache(spec.judge.cache) if spec.judge.cache else None
        self._thread, self._used = AsyncThread(), False
        self._tasks: set[asyncio.Task[Any]] = set()
        found = judge or OpenAIJudge(spec.judge)
        self._metered = found if isinstance(found, MeteredJudge) else None
        self.together = self._metered is not None and self._metered.together
        self.grader = Grader(found, spec.judge, self._cache)

    def grade(self, question: Question, answers: Sequence[str]) -> Future[list[Graded] | Exception]:
        """Begins with the answers to one prompt, beside the caller. What went wrong is given back and not raised: the loop would
        complain about an exception in a task that nobody waits for any more."""
        self._used = True
        return self._thread.start(self._tracked(self.grader.grade(question, answers)), None)

    async def _tracked(self, work: Coroutine[Any, Any, list[Graded]]) -> list[Graded] | Exception:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work
        except Exception as error:
            return error
        finally:
            self._tasks.discard(task)

    async def _end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._metered is not None:
            await self._metered.close()
        await asyncio.get_running_loop().shutdown_asyncgens()  # of requests that were cancelled

    def question(self, prompt: Prompt) -> Question:
        """What the judge is asked about the answers to a prompt. Raises ConfigError where its row lacks what the rubric needs."""
        value = prompt.columns.get(self._column) if self._column else None
        rubric = self._rubric if value is None else row_rubric(value)
        if rubric is None:
            raise ConfigError(
                f"the row has no rubric in column {self._column!r}; fill it, or give `rubric` for such rows"
            )
        return Question(rubric, shown_prompt(prompt.text), self._reference(rubric, prompt.columns))

    def _reference(self, rubric: Rubric, columns: Mapping[str, Any]) -> str:
        if rubric.reference_column:
            value = columns.get(rubric.reference_column)
            if value is None:
                raise ConfigError(
                    f"the row has no {rubric.reference_column!r}, which the rubric's reference_column names"
                )
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if not self.hybrid:
            return ""
        try:
            return gold_answer(columns, self._gold_column)
        except DataError as error:
            raise ConfigError(str(error)) from None

    def problem(self, prompt: Prompt) -> str | None:
        """Why the answers to a prompt can't be graded, or None."""
        try:
            self.question(prompt)
        except ConfigError as error:
            return str(error)
        return None

    def open(self, prompts: Sequence[Prompt]) -> Judging:
        """For the groups of one scoring call."""
        return Judging(self, prompts)

    def take_metrics(self) -> list[tuple[str, float]]:
        """What asking cost since the last call: names and values."""
        counts, self.grader.counts = self.grader.counts, Counts()
        found = {}
        if counts.verdicts:
            found = {
                "verdicts": float(counts.verdicts),
                "cache_hits": counts.kept / counts.verdicts,
                "asked_again": counts.repeated / counts.verdicts,
                "failures": counts.failed / counts.verdicts,
            }
        if counts.spread:
            found["disagreement"] = sum(counts.spread) / len(counts.spread)
        if counts.agreements:
            found["order_agreement"] = sum(counts.agreements) / len(counts.agreements)
        if self._metered is not None and self._metered.meter.requests:
            meter, self._metered.meter = self._metered.meter, Meter()
            found |= {"requests": float(meter.requests), "retries": float(meter.retries)}
            found |= {"tokens": float(meter.prompt_tokens + meter.completion_tokens)}
            if meter.answered:
                found["latency_seconds"] = meter.seconds / meter.answered
        return [(f"judge/{self.name}/{key}", value) for key, value in found.items()]

    def close(self) -> None:
        """Ends its thread and connections; may be called twice."""
        if self._used:
            self._used = False
            with suppress(TimeoutError):
                self._thread.start(self._end(), None).exception(5.0)
        self._thread.close()
        if self._cache is not None:
            self._cache.close()


class Judging:
    """The groups of one scoring call at the judge."""

    def __init__(self, reward: JudgedReward, prompts: Sequence[Prompt]) -> None:
        self._reward, self._prompts = reward, prompts
        self._started: dict[int, Future[list[Graded] | Exception]] = {}
        self._begun = 0.0
        self.seconds = 0.0
        """From the first question until all were answered."""

    def add(self, index: int, group: Sequence[Rollout]) -> None:
        """Sends the group of prompt number `index`; returns at once. Of a hybrid nothing is sent before the rule has spoken, and to a
        judge that shares this process nothing before all answers are sampled."""
        if not (self._reward.hybrid or self._reward.together):
            self._send(index, [r.completion.text for r in group])

    def finish(self, groups: Sequence[Sequence[Rollout]], ruled: Result | None) -> Result:
        """An outcome a rollout, in order. `ruled` are those of a hybrid's rule. Raises RewardError when the budget stops the run."""
        result = self._review(groups, ruled) if ruled is not None else self._collect(groups)
        self.seconds = time.monotonic() - self._begun if self._begun else 0.0
        result.metrics += self._reward.take_metrics()
        return result

    def cancel(self) -> None:
        for future in self._started.values():
            future.cancel()

    def _send(self, index: int, texts: Sequence[str]) -> None:
        self._begun = self._begun or time.monotonic()
        try:
            question = self._reward.question(self._prompts[index])
        except ConfigError as error:
            outcome = Outcome(ERROR, None, str(error))
            self._started[index] = Future()
            self._started[index].set_result([Graded(outcome)] * len(texts))
            return
        self._started[index] = self._reward.grade(question, texts)

    def _graded(self, index: int) -> list[Graded]:
        """Waits for a group. Raises what its grading raised."""
        found = self._started[index].result()
        if isinstance(found, Exception):
            raise found
        return found

    def _collect(self, groups: Sequence[Sequence[Rollout]]) -> Result:
        for i, group in enumerate(groups):
            if i not in self._started:
                self._send(i, [r.completion.text for r in group])
        graded = [g for i in range(len(groups)) for g in self._graded(i)]
        notes = {f"{self._reward.name}_scores": [g.note for g in graded]}
        return Result([g.outcome for g in graded], notes, seconds=[g.seconds for g in graded])

    def _review(self, groups: Sequence[Sequence[Rollout]], ruled: Result) -> Result:
        """The rule's outcomes, but the judge's where the rule said no or could not say, and the answer may be shown to a judge."""
        name, at = self._reward.name, 0
        places: dict[int, list[int]] = {}
        doubted = filtered = 0
        for i, group in enumerate(groups):
            for rollout in group:
                if says_no(ruled.outcomes[at]):
                    doubted += 1
                    if self._may_be_shown(rollout):
                        places.setdefault(i, []).append(at)
                    else:
                        filtered += 1
                at += 1
        texts = [r.completion.text for group in groups for r in group]
        for i, rows in places.items():
            self._send(i, [texts[k] for k in rows])
        outcomes, overruled = list(ruled.outcomes), 0
        seconds = list(ruled.seconds) or [None] * len(outcomes)
        notes: list[dict[str, Any] | None] = [None] * len(texts)
        for i, rows in places.items():
            for k, graded in zip(rows, self._graded(i), strict=True):
                overruled += (graded.outcome.value or 0.0) > (outcomes[k].value or 0.0)
                outcomes[k], notes[k] = graded.outcome, graded.note
                seconds[k] = (seconds[k] or 0.0) + graded.seconds
        asked = doubted - filtered
        shares = {"doubted": doubted, "filtered": filtered, "asked": asked, "overruled": overruled}
        metrics = [(f"hybrid/{name}/{key}", value / max(1, len(texts))) for key, value in shares.items()]
        extra = {**ruled.extra, f"{name}_scores": notes}
        return Result(outcomes, extra, [*ruled.metrics, *metrics], seconds)

    def _may_be_shown(self, rollout: Rollout) -> bool:
        try:
            reference = self._reward.question(rollout.prompt).reference
        except ConfigError:  # nothing to compare with
            return False
        return acceptable(rollout.completion.text, reference)
