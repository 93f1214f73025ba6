"""Majority votes: what completions answer, which answers are the same to the verifier, and how often the commonest is right. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmrl.config.reward import RewardSpec
from llmrl.errors import ConfigError
from llmrl.evaluation.metrics import sample_sizes
from llmrl.rewards.answer import last_boxed
from llmrl.rewards.base import FAILURES
from llmrl.rewards.load import import_target, is_builtin
from llmrl.rewards.runner import RewardRunner
from llmrl.types import Completion, Prompt, Rollout, ScoredRollout

# Comparing answers that a model wrote can be slow on purpose: so much of it a problem, and no more.
MOST_COMPARISONS, MOST_LATE, AT_ONCE, SECONDS = 500, 4, 16, 2.0
_RIGHT = 0


@dataclass(frozen=True)
class Ballot:
    """The samples of one problem: what each answers (None: nothing), which the verifier found right, and the problem's columns."""

    id: str
    answers: Sequence[str | None]
    correct: Sequence[bool]
    columns: Mapping[str, Any] = field(default_factory=dict)


def reads_answers(scorer: RewardSpec) -> bool:
    """Whether the scorer judges an answer that can be read out of a completion: mathematics, a letter, a text; not code or instructions.

    For the others there is neither a format rate nor a majority.
    """
    return _reader(scorer) is not None


def extract(scorer: RewardSpec, text: str, columns: Mapping[str, Any]) -> str | None:
    r"""What the scorer's verifier takes for the answer of a completion, or None where it finds none. Linear in the length of the text.

    `columns` are the problem's, the reference answer among them: where it is a number, the last number of an unmarked text counts.
    Raises ConfigError for a scorer that reads no answers (`reads_answers`).
    Example: extract(RewardSpec(function="math_answer"), r"so \boxed{\frac12}", {"answer": "0.5"}) -> r"\frac12"
    """
    read = _reader(scorer)
    if read is None:
        raise ConfigError(f"{scorer.function or 'a model or judge'} reads no answers out of completions")
    answer: str | None = read(text, **{**columns, **scorer.args})  # a column may be called like an argument
    return answer


def _reader(scorer: RewardSpec) -> Any:
    return getattr(import_target(scorer.function), "read_answer", None) if is_builtin(scorer.function) else None


def format_rate(answers: Sequence[Sequence[str | None]]) -> float:
    """The share of completions with an answer; of each problem's samples. Raises ValueError without any completion."""
    every = [answer is not None for row in answers for answer in row]
    if not every:
        raise ValueError("the format rate of no completions")
    return sum(every) / len(every)


def classes(scorer: RewardSpec, ballots: Sequence[Ballot]) -> list[list[int | None]]:
    """A class number a sample, None for samples without an answer; equal numbers in one problem are the same answer to the verifier.

    Answers that were found right equal the reference, and are class 0. The others are compared by the verifier itself, in its worker
    processes: the commonest text of a class is the reference for the rest. Where a problem has used up its comparisons (500, or 4 that
    failed or took longer than 2 seconds), the answers that are left are the same only if their texts are.
    """
    sorters = [_sorter(_wrong_texts(ballot)) for ballot in ballots]
    found: list[dict[str, int]] = [{} for _ in ballots]
    asked: dict[int, list[tuple[str, str]]] = {}

    def proceed(number: int, verdicts: list[bool | None] | None) -> None:
        try:
            asked[number] = sorters[number].send(verdicts)
        except StopIteration as done:
            asked.pop(number, None)
            found[number] = done.value

    for number in range(len(ballots)):
        proceed(number, None)
    if asked:
        # A judge beside the verifier would be paid for every pair. One reward of weight 1, so that a value is a verdict.
        limit = min(scorer.timeout or SECONDS, SECONDS)
        spec = scorer.model_copy(update={"judge": None, "weight": 1.0, "timeout": limit})
        with RewardRunner([spec], on_error="skip") as runner:
            while asked:
                rollouts = [_comparison(scorer, ballots[n], *pair) for n, pairs in asked.items() for pair in pairs]
                verdicts = iter(map(_verdict, runner.score(rollouts)))
                for number, pairs in list(asked.items()):
                    proceed(number, [next(verdicts) for _ in pairs])
    return [
        [None if a is None else _RIGHT if right else labels[a] for a, right in zip(b.answers, b.correct, strict=True)]
        for b, labels in zip(ballots, found, strict=True)
    ]


def _wrong_texts(ballot: Ballot) -> list[str]:
    """The different answers that are not right, the commonest first."""
    wrong = [a for a, right in zip(ballot.answers, ballot.correct, strict=True) if a is not None and not right]
    return [text for text, _ in Counter(wrong).most_common()]


def _sorter(texts: list[str]) -> Generator[list[tuple[str, str]], list[bool | None] | None, dict[str, int]]:
    """Asks for pairs (reference, answer), is sent whether each is equal (None: nobody knows), and returns the texts' classes, from 1."""
    labels: dict[str, int] = {}
    compared = late = 0
    while texts:
        first, *rest = texts
        labels[first] = max(labels.values(), default=_RIGHT) + 1
        texts = []
        for start in range(0, len(rest), AT_ONCE):
            some = rest[start : start + AT_ONCE]
            if compared + len(some) > MOST_COMPARISONS or late >= MOST_LATE:
                texts += some
                continue
            compared += len(some)
            verdicts = yield [(first, text) for text in some]
            assert verdicts is not None
            late += verdicts.count(None)
            labels |= {text: labels[first] for text, same in zip(some, verdicts, strict=True) if same}
            texts += [text for text, same in zip(some, verdicts, strict=True) if not same]
    return labels


def _comparison(scorer: RewardSpec, ballot: Ballot, reference: str, answer: str) -> Rollout:
    """An answer put to the verifier as a completion, with another one as the reference."""
    columns = {**ballot.columns, str(scorer.args.get("column") or "answer"): reference}
    text = rf"\boxed{{{answer}}}"
    if last_boxed(text) != answer:  # its braces do not match
        text = f"<answer>{answer}</answer>"
    return Rollout(Prompt(ballot.id, (), "", columns), Completion((), (), "stop", text))


def _verdict(scored: ScoredRollout) -> bool | None:
    """Whether the two are equal; None where the comparison failed. A text that can't be a reference equals nothing else."""
    (kind,) = scored.outcomes.values()
    return None if kind in FAILURES else scored.reward is not None and scored.reward > 0.5


def maj_at_k(labels: Sequence[int | None], correct: Sequence[bool], k: int) -> float:
    """How often the majority among k of the n samples is right: the expectation over all subsets of k, exactly.

    labels: the samples' classes, None for those without a vote; correct: whether each is right. The largest class wins, several largest
    ones share evenly, and a subset without a vote is wrong. A class of which a part is right counts as that part.
    The counts of the classes in a random subset are binomials (of any common p) given their sum, so all sums have positive terms and
    small numbers. Raises ValueError unless 1 <= k <= n.

    Example: maj_at_k([0, 0, 1], [True, True, False], 3) -> 1.0; with k = 2, a third of the subsets has no tie: 2 / 3
    """
    n = len(labels)
    if not 1 <= k <= n or len(correct) != n:
        raise ValueError(f"maj@k needs 1 <= k <= n, and a verdict a sample; got n={n}, k={k}, {len(correct)} verdicts")
    sizes = Counter(label for label in labels if label is not None)
    right = Counter(label for label, is_right in zip(labels, correct, strict=True) if label is not None and is_right)
    silent = n - sum(sizes.values())
    whole = _binomials(n, k / n, k)[k]
    total = 0.0
    for label, count in right.items():
        others = [size for other, size in sizes.items() if other != label]
        total += count / sizes[label] * _wins(sizes[label], others, silent, k, k / n)
    return float(total / whole)


def _wins(size: int, others: Sequence[int], silent: int, k: int, p: float) -> float:
    """The probability that k are drawn, and that the class of that size wins (a tie of t: 1 / t), where each sample is drawn with p."""
    own, unvoted = _binomials(size, p, k), _binomials(silent, p, k)
    total = 0.0
    for votes in range(1, min(size, k) + 1):
        rest = k - votes
        ways = np.zeros((rest // votes + 1, rest + 1))  # [other classes with as many votes, votes of all others]
        ways[0, 0] = 1.0
        for other in others:
            chance, before = _binomials(other, p, k), ways
            ways = np.zeros_like(before)
            for fewer in range(min(votes - 1, other, rest) + 1):
                ways[:, fewer:] += chance[fewer] * before[:, : rest + 1 - fewer]
            if votes <= min(other, rest):
                ways[1:, votes:] += chance[votes] * before[:-1, : rest + 1 - votes]
        shares = 1 / np.arange(1, len(ways) + 1)
        total += own[votes] * float(shares @ ways @ unvoted[rest::-1])
    return total


def _binomials(n: int, p: float, most: int) -> np.ndarray:
    """Binomial probabilities of 0 to `most` of n."""
    out = np.zeros(most + 1)
    for i in range(min(n, most) + 1):
        if p == 1:
            out[i] = float(i == n)
        else:
            choose = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
            out[i] = math.exp(choose + i * math.log(p) + (n - i) * math.log1p(-p))
    return out


def mean_maj_at_k(labels: Sequence[Sequence[int | None]], correct: Sequence[Sequence[bool]]) -> dict[int, float]:
    """maj@k averaged over problems, for k = 1, 2, 4, ... and the largest number of samples; problems with fewer than k are left out."""
    out = {}
    for k in sample_sizes([len(row) for row in labels]):
        values = [maj_at_k(row, right, k) for row, right in zip(labels, correct, strict=True) if len(row) >= k]
        out[k] = sum(values) / len(values)
    return out
