"""The nouns that the folders hand to each other.

Nothing here imports torch, numpy or transformers at run time, so that reward workers start in milliseconds.
Shapes: T tokens of a packed batch, N sequences in it, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch

Messages = list[dict[str, Any]]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """What a completion is sampled from.

    `text` is what the user's data held: a string, or a list of messages when the row is conversational; reward functions
    get it as it is. `ids` are the rendered tokens. `columns` are the other columns of the row, forwarded to reward functions.

    Example: Prompt(id="gsm8k/train/00000", ids=(1, 50, 7), text="2+3=", columns={"answer": "5"})
    """

    id: str
    ids: tuple[int, ...]
    text: str | Messages
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """Token ids as the engine sampled them (the stop token included), never re-tokenised.

    `sampled_logprobs[i]` is the natural log-probability of `ids[i]` under the distribution that was sampled from
    (temperature and any top-k/top-p/min-p mask applied). `finish_reason` is "length" exactly when the token limit cut it.
    `version` is the weight version that sampled it. Where weights were updated meanwhile, `versions[i]` is that of `ids[i]` and `version`
    the oldest with a part in it, be it in cached keys of the prompt; otherwise `versions` is empty. `text` is the decoded answer without special tokens.
    """

    ids: tuple[int, ...]
    sampled_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    text: str
    version: int = 0
    versions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """A prompt with one of its completions; `index` is the sample's number in its group, from 0."""

    prompt: Prompt
    completion: Completion
    index: int = 0


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with its rewards.

    `parts` holds every reward function's own value by name (None: it did not apply, or it failed and the policy is `skip`).
    `reward` is the combined value, None when every part is None. `outcomes` says per function what happened:
    "score", "not-applicable", "malformed", "timeout" or "error". `seconds` has the time of each part that was measured (of a function
    that gets all rows at once: an equal share of the call), `notes` why it is what it is, of those that say so.
    """

    rollout: Rollout
    reward: float | None
    parts: Mapping[str, float | None]
    outcomes: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. temperature 0 is greedy. Randomness is keyed by (seed, step, prompt id, sample index)."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    step: int = 0

    @property
    def truncated_support(self) -> bool:
        """True when the sampler renormalises over a part of the vocabulary, which training log-probs do not."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True)
class Example:
    """One tokenised sequence for training, on the host.

    `loss_mask[t]` is True when the log-prob *of* token t enters the loss; it is False at t = 0, which nothing predicts.
    `payload[name][t]` belongs to token t as well, `scalars[name]` to the sequence. Examples of one `unit` stay in one microbatch.

    With `prefix` = P > 0, the first P tokens of the unit's first example stand before this one: they are computed once for the
    unit and not repeated in input_ids, loss_mask or payload. Token 0 is then predicted by the prefix and may be in the loss.

    Example: Example(input_ids=np.array([5, 6, 7], np.int32), loss_mask=np.array([False, True, True]), unit=0)
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    unit: int = 0
    payload: Mapping[str, np.ndarray] = field(default_factory=dict)
    id: str = ""
    scalars: Mapping[str, float] = field(default_factory=dict)
    prefix: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end, without padding: what every forward sees.

    input_ids [T] int64; position_ids [T] int64, restarting at 0; cu_seqlens [N+1] int32 on the device and, as
    `cu_seqlens_host`, a tuple on the host; unit_ids [N] int64; loss_mask [T] bool; payload: name -> [T]; scalars: name -> [N] float32.
    `prefixes` is () or, on the host, a (start, length) a sequence: the tokens input_ids[start : start + length] stand before it as
    if they were its own, and its positions begin at `length` (length 0: nothing does). `max_seqlen` counts prefixes too.
    K below is the number of True in loss_mask; `select` and the log-probs of a forward are [K], in token order.

    Example: documents [5, 6] and [7, 8, 9] give input_ids [5, 6, 7, 8, 9], position_ids [0, 1, 0, 1, 2], cu_seqlens [0, 2, 5].
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    cu_seqlens_host: tuple[int, ...]
    max_seqlen: int
    unit_ids: torch.Tensor
    loss_mask: torch.Tensor
    payload: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scalars: Mapping[str, torch.Tensor] = field(default_factory=dict)
    prefixes: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens_host[-1]

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens_host) - 1

    def positions(self) -> torch.Tensor:
        """[K] int64: the indices of the tokens that enter the loss."""
        return self.loss_mask.nonzero().squeeze(-1)

    def predecessors(self) -> torch.Tensor:
        """[K] int64: the index of the token before each token in the loss, whose hidden state predicts it.

        The causal shift is here and nowhere else.
        """
        import torch

        pairs = [(first, start + n - 1) for (start, n), first in zip(self.prefixes, self.cu_seqlens_host) if n]
        if not pairs:
            return self.positions() - 1
        firsts, ends = torch.tensor(pairs, device=self.input_ids.device).unbind(1)
        before = torch.arange(-1, self.num_tokens - 1, device=self.input_ids.device)
        return before.index_copy(0, firsts, ends)[self.loss_mask]

    def last_positions(self) -> torch.Tensor:
        """[N] int64: the index of each sequence's last token."""
        import torch

        return self.cu_seqlens[1:].to(torch.int64) - 1

    def select(self, name: str) -> torch.Tensor:
        """[K]: the payload of the tokens that enter the loss."""
        return self.payload[name][self.loss_mask]

    def sequence_of_positions(self) -> torch.Tensor:
        """[K] int64: the sequence (0..N-1) that each selected token belongs to."""
        import torch

        return torch.bucketize(self.positions(), self.cu_seqlens[1:].to(torch.int64), right=True)


class PolicyWeights(Protocol):
    """The policy's weights, as an engine takes them: a fresh pass an iteration, tensor by tensor, never the whole model at once.

    Names and shapes are those of the plain model's checkpoint, adapters merged in. With several processes all of them have to
    iterate, and to the end: a sharded tensor is gathered by all.
    """

    adapter_rank: int | None
    """Rank of the LoRA adapter that is all that is trained; None without one, and for adapters that only merging can express
    (DoRA, other modules saved beside it)."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same without what the adapter adds."""
        ...

    def adapter(self) -> Callable[[Path], None]:
        """What writes the adapter as it is now, alone and in peft's layout, into a directory. All processes call this, one writes."""
        ...


@dataclass(frozen=True)
class SyncReport:
    """What one weight sync moved: `count` tensors of `bytes`, in `seconds`; `digest` identifies their values.

    An engine that shares the trainer's tensors moves nothing.
    """

    version: int
    count: int = 0
    bytes: int = 0
    digest: str = ""
    seconds: float = 0.0


OnGroup = Callable[[int, "list[Rollout]"], None]
"""Called with a prompt's place in the call and its group, as soon as the group is finished; one call at a time, from any thread."""


class RolloutEngine(Protocol):
    """Samples completions."""

    @property
    def version(self) -> int:
        """The weight version that it samples with."""
        ...

    @property
    def dtype(self) -> torch.dtype | None:
        """The number type of its own copy of the weights, None without one."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        """One group of `num_generations` rollouts a prompt, in the order of `prompts`."""
        ...

    def sync_weights(self, weights: PolicyWeights, version: int) -> SyncReport:
        """Samples with these weights from now on; every process calls it."""
        ...

    def probe(self, ids: Sequence[int], sampling: Sampling) -> list[Completion]:
        """A completion of the same prompt tokens from each place that holds its own copy of the weights; empty when none does."""
        ...

    def verify(self) -> None:
        """Raises SyncError when a copy of the weights is no longer what the last sync made it."""
        ...

    def rest(self) -> None:
        """Frees what training can use until the next call, where engine and trainer share a device."""
        ...

    def close(self) -> None:
        """Lets go of connections, files and memory; may be called twice."""
        ...


class Judge(Protocol):
    """Answers a grading prompt with text, which should be JSON of the schema. Raises JudgeError (llmrl.rewards.judge_budget) where it can't."""

    async def ask(self, messages: Messages, schema: Mapping[str, Any]) -> str: ...
