"""Multiple choice without sampling: which choice's text is likeliest after the prompt.

`acc` takes the choice of the highest log-prob, `acc_norm` that of the highest log-prob over the length of its text in characters, as
lm-eval has them. The choices of a problem share the forward of their prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmrl.data.packing import cut, pack
from llmrl.errors import DataError
from llmrl.evaluation.benchmarks import Benchmark
from llmrl.evaluation.metrics import accuracy_interval
from llmrl.evaluation.result import EvalResult
from llmrl.models.forward import PolicyModule
from llmrl.types import Example, Prompt


@dataclass(frozen=True)
class Choices:
    """A problem: for each choice its label, its text, and the tokens of context and continuation; `gold` is the right one's number."""

    id: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[list[int], list[int]], ...]
    gold: int

    @property
    def longest(self) -> int:
        return max(len(context) + len(continuation) for context, continuation in self.tokens)


def read_choices(prompts: Sequence[Prompt], tokenizer: Any) -> list[Choices]:
    """Problems with `choices` ({label, text} each) and the right label as `answer`, tokenised. Raises DataError for others."""
    out = []
    for prompt in prompts:
        listed, answer = prompt.columns.get("choices") or (), prompt.columns.get("answer")
        labels = [choice["label"] for choice in listed]
        if answer not in labels or len(set(labels)) < len(labels):
            raise DataError(
                f"{prompt.id}: the answer {answer!r} is not one of the choices {labels}, or two have one label"
            )
        texts = [choice["text"] for choice in listed]
        if blank := [label for label, text in zip(labels, texts) if not text.strip()]:
            raise DataError(f"{prompt.id}: the text of choice {blank[0]} is empty, so it has no log-prob")
        pairs = tuple(tokens_of(tokenizer, str(prompt.text), f" {text}") for text in texts)
        out.append(Choices(prompt.id, tuple(labels), tuple(texts), pairs, labels.index(answer)))
    return out


def tokens_of(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of both, together, cut where the context's own tokens end; spaces at its end are taken for the continuation's.

    So a token that would span the cut belongs to neither by itself, but every continuation is tokenised as it is in running text.
    """
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    # A BOS is put before the text where the tokenizer does so, unless the text has one already.
    bos = tokenizer.bos_token
    special = not (bos and bare.startswith(bos))
    whole = tokenizer.encode(bare + continuation, add_special_tokens=special)
    n = len(tokenizer.encode(bare, add_special_tokens=special))
    return list(whole[:n]), list(whole[n:])


def logprobs(
    problems: Sequence[Choices],
    module: PolicyModule,
    *,
    tokens_per_forward: int = 16_384,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    on_problems: Callable[[int], None] = lambda count: None,
) -> list[list[float]]:
    """Of each problem, the natural log-prob of each choice's tokens after its context: their sum, in nats.

    `on_problems` is told how many problems each forward has finished.
    """
    device = next(module.parameters()).device
    examples = [example for number, problem in enumerate(problems) for example in _examples(number, problem)]
    sums = [[0.0] * len(problem.texts) for problem in problems]
    training = module.training
    module.eval()
    try:
        for part in cut(examples, tokens_per_forward):
            batch = pack(part, device)
            with torch.no_grad(), autocast():
                scored = module(batch).logprobs.double()
            totals = torch.zeros(len(part), dtype=torch.float64, device=device)
            totals.index_add_(0, batch.sequence_of_positions(), scored)
            for example, total in zip(part, totals.tolist(), strict=True):
                sums[example.unit][int(example.id)] = total
            on_problems(len({example.unit for example in part}))
    finally:
        module.train(training)
    return sums


def _examples(unit: int, problem: Choices) -> list[Example]:
    """A sequence a choice; those whose context has the first one's tokens share it."""
    out = []
    trunk = problem.tokens[0][0]
    for number, (context, continuation) in enumerate(problem.tokens):
        shared = number > 0 and context == trunk
        ids = np.array(continuation if shared else context + continuation, dtype=np.int32)
        mask = np.arange(len(ids)) >= (0 if shared else len(context))
        out.append(Example(ids, mask, unit=unit, id=str(number), prefix=len(trunk) if shared else 0))
    return out


def result_of(
    benchmark: Benchmark,
    problems: Sequence[Choices],
    prompts: Sequence[Prompt],
    found: Sequence[Sequence[float]],
    **kwargs: Any,
) -> EvalResult:
    """The result: `correct` by the benchmark's metric; each row has its choices' log-probs, and both metrics stand beside each other.

    Of equal choices the first one counts, as in lm-eval.
    """
    spec = benchmark.spec
    rows, right = [], {"acc": [0] * len(problems), "acc_norm": [0] * len(problems)}
    for number, (problem, prompt, sums) in enumerate(zip(problems, prompts, found, strict=True)):
        chosen = {
            "acc": int(np.argmax(sums)),
            "acc_norm": int(np.argmax([s / len(text) for s, text in zip(sums, problem.texts, strict=True)])),
        }
        for metric, place in chosen.items():
            right[metric][number] = int(place == problem.gold)
        place = chosen["acc_norm" if spec.metric == "acc_norm" else "acc"]
        correct = place == problem.gold
        rows.append(
            {
                "id": problem.id,
                "correct": [correct],
                "rewards": [float(correct)],
                "outcomes": ["score"],
                "answers": [problem.labels[place]],
                "lengths": [len(problem.tokens[place][1])],
                "finish": [None],
                "completions": [problem.texts[place]],
                "notes": [None],
                "meta": {name: prompt.columns.get(name) for name in spec.breakdown},
                "logprobs": dict(zip(problem.labels, sums, strict=True)),
                "acc": bool(right["acc"][number]),
                "acc_norm": bool(right["acc_norm"][number]),
            }
        )
    extra = {
        metric: dict(zip(("accuracy", "low", "high"), accuracy_interval(counts, 1))) for metric, counts in right.items()
    }
    return EvalResult(rows, benchmark.name, extra=extra, **kwargs)
