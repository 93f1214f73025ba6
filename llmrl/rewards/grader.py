"""Grades the answers to one prompt by a rubric: asks the judge, repeats a question once, keeps verdicts, averages or compares."""

from __future__ import annotations

import asyncio
import json
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from llmrl.config.rubric import JudgeSettings, Rubric
from llmrl.rewards.base import ERROR, MALFORMED, NOT_APPLICABLE, SCORE, TIMEOUT, Outcome, describe_error
from llmrl.rewards.judge_budget import BudgetSpent, JudgeError
from llmrl.rewards.judge_cache import JudgeCache, content_key
from llmrl.rewards.rubric import (
    PROMPT_VERSION,
    pair_messages,
    reward,
    score_messages,
    score_schema,
    shortened,
    winner_schema,
)
from llmrl.rewards.verdict import VerdictError, read_reasons, read_scores, read_winner
from llmrl.types import Judge, Messages

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What is graded: the answers to a prompt, by a rubric, perhaps with a reference answer."""

    rubric: Rubric
    prompt: str
    reference: str = ""


@dataclass(frozen=True)
class Graded:
    """An answer's outcome, and what the judge said: criterion -> mean score, wins and comparisons, or why it failed.

    The outcome of a score has the judge's scores and reasons as its detail. `seconds`: until it was known, turns that it waited for included.
    """

    outcome: Outcome
    note: dict[str, Any] | None = None
    seconds: float = 0.0


@dataclass
class Counts:
    """What grading met, since it was last taken."""

    verdicts: int = 0  # wanted, kept ones included
    kept: int = 0  # found in the cache
    repeated: int = 0  # questions asked again, after a reply that could not be used
    failed: int = 0
    spread: list[float] = field(default_factory=list)  # std of an answer's reward over samples, ddof 0
    agreements: list[bool] = field(default_factory=list)  # of the two orders of a comparison


class Grader:
    """Grades with `judge`. All of it belongs to one event loop.

    An answer that is empty gets 0 without being shown to the judge, and equal answers get equal rewards.
    """

    def __init__(self, judge: Judge, settings: JudgeSettings, cache: JudgeCache | None = None) -> None:
        self._judge, self._settings, self._cache = judge, settings, cache
        self.counts = Counts()
        # No model sees it, and it is the same for all requests, so that a server compiles the schema once.
        self._id = "v" + secrets.token_hex(6)
        most = settings.most_at_once
        self._slots: AbstractAsyncContextManager[Any] = nullcontext() if most is None else asyncio.Semaphore(most)

    async def grade(self, question: Question, answers: Sequence[str]) -> list[Graded]:
        """An outcome an answer. Raises BudgetSpent where the settings say that the run stops then."""
        different = list(dict.fromkeys(a.strip() for a in answers))
        if self._settings.mode == "score":
            graded = await self._scored(question, different)
        else:
            begun = time.monotonic()
            compared = await self._compared(question, different)
            graded = [replace(g, seconds=time.monotonic() - begun) for g in compared]
        found = dict(zip(different, graded, strict=True))
        return [found[a.strip()] for a in answers]

    async def _scored(self, question: Question, answers: Sequence[str]) -> list[Graded]:
        # All of them end before an error is passed on: none is left behind on the loop.
        found = await asyncio.gather(*(_with_time(self._score(question, a)) for a in answers), return_exceptions=True)
        for value in found:
            if isinstance(value, BaseException):
                raise value
        return [v for v in found if isinstance(v, Graded)]

    async def _score(self, question: Question, answer: str) -> Graded:
        if not answer:
            return Graded(Outcome(SCORE, 0.0), {"empty": True})
        samples = range(self._settings.samples)
        found = await self._all([partial(self._sample, question, answer, n) for n in samples])
        verdicts = [v for v in found if isinstance(v, dict)]
        scores = [v["scores"] for v in verdicts]
        if not scores:
            return _failed(next(e for e in found if isinstance(e, Exception)), self._settings.over_budget)
        rewards = [reward(question.rubric, s) for s in scores]
        if len(rewards) > 1:
            self.counts.spread.append(statistics.pstdev(rewards))
        names = [c.name for c in question.rubric.criteria]
        given = {n: [v for s in scores if (v := s.get(n)) is not None] for n in names}
        note = {n: statistics.fmean(v) if v else None for n, v in given.items()}
        said = ", ".join(f"{n} {'none' if v is None else f'{v:g}'}" for n, v in note.items())
        reasons = next((v["reasons"] for v in verdicts if v["reasons"]), "")
        return Graded(Outcome(SCORE, statistics.fmean(rewards), f"{said}; {reasons}" if reasons else said), note)

    async def _sample(self, question: Question, answer: str, number: int, begin: Callable[[], None]) -> dict[str, Any]:
        """One verdict: "scores", criterion -> score (None only under `missing: zero`), and "reasons", a text."""
        rubric, explain = question.rubric, self._settings.explain
        shown = shortened(answer, self._settings.max_answer_characters)
        messages = score_messages(
            rubric, question.prompt, question.reference, shown, verdict_id=self._id, explain=explain
        )
        schema = score_schema(rubric, self._id, explain)
        names = [c.name for c in rubric.criteria]

        def read(reply: str, last: bool) -> dict[str, Any]:
            try:
                scores: dict[str, float | None] = {**read_scores(reply, rubric, self._id)}
            except VerdictError as error:
                if not last or error.scores is None or rubric.missing == "none":
                    raise
                scores = {name: error.scores.get(name) for name in names}
            return {"scores": scores, "reasons": read_reasons(reply, self._id)}

        key = self._key(question, answers=[shown], sample=number)
        return await self._verdict(key, {"scores": dict, "reasons": str}, messages, schema, read, begin)

    async def _compared(self, question: Question, answers: Sequence[str]) -> list[Graded]:
        """Win rates: a win counts 1 and a tie 0.5, over the comparisons on which both orders agree."""
        n = len(answers)
        if n == 1:
            return [Graded(Outcome(SCORE, 0.5 if answers[0] else 0.0), {"of": 0})]
        reach = min(self._settings.opponents or n, n - 1)
        # Neighbours on a ring: everybody has the same number of comparisons.
        pairs = sorted({(min(i, j), max(i, j)) for i in range(n) for d in range(1, reach + 1) for j in [(i + d) % n]})
        pairs = [(i, j) for i, j in pairs if i != j]
        asked = [(i, j) for i, j in pairs if answers[i] and answers[j]]
        results = dict.fromkeys(pairs, 1.0) | {(i, j): 0.0 for i, j in pairs if not answers[i]}  # an empty one loses
        orders = [(i, j) for pair in asked for i, j in (pair, pair[::-1])]
        verdicts = await self._all([partial(self._pair, question, answers[i], answers[j]) for i, j in orders])
        by_order = dict(zip(orders, verdicts, strict=True))
        errors: dict[int, Exception] = {}
        for i, j in asked:
            one, other = by_order[i, j], by_order[j, i]
            if isinstance(one, Exception) or isinstance(other, Exception):
                del results[i, j]
                errors |= dict.fromkeys((i, j), next(v for v in (one, other) if isinstance(v, Exception)))
                continue
            agree = one == 1.0 - other
            self.counts.agreements.append(agree)
            if agree:
                results[i, j] = one
            else:
                del results[i, j]
        out = []
        for k in range(n):
            points = [v if i == k else 1.0 - v for (i, j), v in results.items() if k in (i, j)]
            if points:
                said = f"{sum(points):g} points of {len(points)} comparisons"
                note = {"points": sum(points), "of": len(points)}
                out.append(Graded(Outcome(SCORE, statistics.fmean(points), said), note))
            elif k in errors:
                out.append(_failed(errors[k], self._settings.over_budget))
            else:
                out.append(Graded(Outcome(NOT_APPLICABLE, None, "no comparison on which both orders agree"), {"of": 0}))
        return out

    async def _pair(self, question: Question, first: str, second: str, begin: Callable[[], None]) -> float:
        """What the answer that stands first gets: 1, 0 or 0.5."""
        limit, explain = self._settings.max_answer_characters, self._settings.explain
        one, other = shortened(first, limit), shortened(second, limit)
        messages = pair_messages(
            question.rubric, question.prompt, question.reference, one, other, verdict_id=self._id, explain=explain
        )
        key = self._key(question, answers=[one, other], sample=0)
        verdict = await self._verdict(
            key,
            {"winner": str},
            messages,
            winner_schema(self._id, explain),
            lambda reply, last: {"winner": read_winner(reply, self._id)},
            begin,
        )
        return {"first": 1.0, "second": 0.0}.get(verdict["winner"], 0.5)

    async def _all(self, jobs: Sequence[Callable[[Callable[[], None]], Awaitable[T]]]) -> list[T | Exception]:
        """The jobs' values or what they raised, each within the deadline. Raises BudgetSpent where that stops the run."""
        found = await asyncio.gather(*(self._timed(job) for job in jobs), return_exceptions=True)
        for value in found:
            if isinstance(value, BudgetSpent) and self._settings.over_budget == "stop":
                raise value
            if isinstance(value, BaseException) and not isinstance(value, Exception):
                raise value
        self.counts.verdicts += len(found)
        self.counts.failed += sum(isinstance(v, Exception) for v in found)
        return [v for v in found if not isinstance(v, BaseException) or isinstance(v, Exception)]

    async def _timed(self, job: Callable[[Callable[[], None]], Awaitable[T]]) -> T:
        """The job's value; the deadline runs from its first request, not while it waits for its turn."""
        seconds = self._settings.row_seconds
        try:
            async with asyncio.timeout(None) as limit:

                def begin() -> None:
                    if seconds is not None:
                        limit.reschedule(asyncio.get_running_loop().time() + seconds)

                return await job(begin)
        except TimeoutError:
            if seconds is None or not limit.expired():  # the judge's own
                raise
            raise JudgeError(f"no verdict after {seconds:g} s", TIMEOUT, True) from None

    async def _verdict(
        self,
        key: str,
        form: Mapping[str, type],
        messages: Messages,
        schema: dict[str, Any],
        read: Callable[[str, bool], dict[str, Any]],
        begin: Callable[[], None],
    ) -> dict[str, Any]:
        """A verdict from the cache or from the judge, who is asked again once, told what was wrong. Raises JudgeError.

        form: the types of a verdict's parts; what is kept in another form is not used.
        """
        kept = None if self._cache is None else self._cache.get(key)
        if kept is not None and all(isinstance(kept.get(part), kind) for part, kind in form.items()):
            self.counts.kept += 1
            return kept
        async with self._slots:
            begin()
            reply = await self._judge.ask(messages, schema)
            try:
                verdict = read(reply, False)
            except VerdictError as error:
                self.counts.repeated += 1
                again = f"That can't be used: {error}. Reply with the JSON object alone, in the form given above."
                said = {"role": "assistant", "content": reply[:2000] or "(nothing)"}
                reply = await self._judge.ask([*messages, said, {"role": "user", "content": again}], schema)
                try:
                    verdict = read(reply, True)
                except VerdictError as second:
                    raise JudgeError(
                        f"the judge's reply can't be used, also when asked again: {second}; it begins {reply[:120]!r}",
                        MALFORMED,
                        True,
                    ) from None
        if self._cache is not None:
            self._cache.put(key, verdict)
        return verdict

    def _key(self, question: Question, *, answers: Sequence[str], sample: int) -> str:
        rubric = question.rubric.model_dump(mode="json", exclude={"examples", "reference_column"})
        s = self._settings
        return content_key(
            version=PROMPT_VERSION,
            form=2,  # of what is kept
            model=s.model,
            rubric=json.dumps(rubric, sort_keys=True),
            prompt=question.prompt,
            reference=question.reference,
            answers=list(answers),
            sampling=[s.temperature, s.max_tokens, s.explain, sample],
            mode=s.mode,
        )


async def _with_time(grading: Awaitable[Graded]) -> Graded:
    begun = time.monotonic()
    graded = await grading
    return replace(graded, seconds=time.monotonic() - begun)


def _failed(error: Exception, over_budget: str) -> Graded:
    if isinstance(error, BudgetSpent) and over_budget == "none":
        outcome = Outcome(NOT_APPLICABLE, None, str(error))
    elif isinstance(error, JudgeError):
        outcome = Outcome(error.kind, None, str(error), error.row_caused)
    else:
        outcome = Outcome(ERROR, None, describe_error(error))
    return Graded(outcome, {"failed": outcome.detail[:300]})
