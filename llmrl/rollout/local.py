"""Rollouts in the training process, on any device: the embedded default engine.

Every distinct prompt is prefilled once, packed and without padding; its keys and values are expanded to the group; all rows decode
together; finished rows leave the batch, and waiting prompts take their place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmrl.errors import RolloutError
from llmrl.models.attention import PackedLayout
from llmrl.models.decode import BLOCK, DecodeCache, DecodeLayout
from llmrl.models.forward import PolicyModule
from llmrl.models.twin import Twin
from llmrl.rollout.sampling import draw, uniforms
from llmrl.types import Completion, FinishReason, OnGroup, PolicyWeights, Prompt, Rollout, Sampling, SyncReport

Progress = Callable[[int, int], None]
"""Called after every decoding step with the number of tokens sampled and of rows finished so far."""

_PREFILL_TOKENS = 16_384
"""Prompt tokens of one prefill forward, so that its activations stay small beside the cache."""
_LOGITS = 2**26
"""Logits made at once: 256 MiB in float32."""


class _Row:
    """One completion in the making, of group number `group`. `slot` is the position of its newest token, which is where that token's
    keys go."""

    def __init__(self, prompt: Prompt, index: int, sampling: Sampling, group: int) -> None:
        self.prompt, self.index, self.group = prompt, index, group
        self.uniforms = uniforms(sampling, prompt.id, index)
        self.slot = len(prompt.ids) - 1
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: FinishReason | None = None


@dataclass(frozen=True)
class _Job:
    """Rows that start from the same prompt ids and so share one prefill."""

    ids: tuple[int, ...]
    rows: list[_Row]


class LocalEngine:
    """Samples from the module that is being trained (`RolloutEngine`); weights are shared, so there is nothing to copy.

    module: the PolicyModule, or a Hugging Face causal LM to put into one. stop_token_ids: any of them ends a completion and is its last
    token. max_batch_tokens: rows x (longest prompt + max_tokens) decoded at once; a single row may exceed it.
    autocast: makes the context that training forwards run in. progress: see `Progress`.
    twin: a plain copy of a sharded module to sample from; it has weights from `sync_weights` until `rest`.
    Models that can't be packed are decoded with a cache of their own, a batch of equally long prompts at a time: slower, same results.

    Example: LocalEngine(model, tokenizer, stop_token_ids=(2,)).generate([prompt], 8, Sampling(max_tokens=64))[0][3].completion.text
    """

    def __init__(
        self,
        module: PolicyModule | torch.nn.Module,
        tokenizer: Any,
        *,
        stop_token_ids: Iterable[int],
        max_batch_tokens: int = 262_144,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Progress | None = None,
        twin: Twin | None = None,
    ) -> None:
        self._twin = twin
        if twin is not None:
            module = twin.module
        self.module = module if isinstance(module, PolicyModule) else PolicyModule(module)
        self.tokenizer = tokenizer
        self.stop_token_ids = frozenset(stop_token_ids)
        self.max_batch_tokens = max_batch_tokens
        self.autocast = autocast
        self.progress = progress
        self.version = 0
        self.dtype: torch.dtype | None = None  # it samples with the trainer's own
        self.config: Any = self.module.model.config.get_text_config()  # type: ignore[operator, union-attr]

    def sync_weights(self, weights: PolicyWeights | None, version: int) -> SyncReport:
        """Sets the version that completions carry; `weights` are read where they are not the trainer's own."""
        self.version = version
        if self._twin is None or weights is None:
            return SyncReport(version)
        began = time.perf_counter()
        return SyncReport(version, *self._twin.load(weights), seconds=time.perf_counter() - began)

    def probe(self, ids: Sequence[int], sampling: Sampling) -> list[Completion]:
        """Empty: there is no other copy of the weights."""
        return []

    def verify(self) -> None:
        """Nothing to compare."""

    def rest(self) -> None:
        """Lets go of a separate copy's weights; else nothing is held between calls."""
        if self._twin is not None:
            self._twin.release()

    def close(self) -> None:
        """Nothing to let go of."""

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling, on_group: OnGroup | None = None
    ) -> list[list[Rollout]]:
        """One group of `num_generations` rollouts a prompt, in the order of `prompts`. `on_group` is called between two tokens.

        The same prompt id, seed and step give the same completions, whatever else is sampled with them (up to rounding of the logits).
        Raises RolloutError for a prompt that is empty, too long or not of this vocabulary, and for logits that are not finite.
        """
        self._check(prompts, num_generations, sampling)
        groups = [[_Row(p, i, sampling, number) for i in range(num_generations)] for number, p in enumerate(prompts)]
        jobs = self._jobs([row for group in groups for row in group], sampling.max_tokens)
        unfinished = [num_generations] * len(groups)
        rollouts: list[list[Rollout]] = [[] for _ in groups]

        def finished(row: _Row) -> None:
            unfinished[row.group] -= 1
            if not unfinished[row.group]:
                rollouts[row.group] = self._rollouts(groups[row.group])
                if on_group is not None:
                    on_group(row.group, rollouts[row.group])

        decoder = _PackedDecoder if self.module.packing == "packed" else _PlainDecoder
        with self._inference():
            decoder(self, sampling, finished).run(jobs)
        return rollouts

    def _check(self, prompts: Sequence[Prompt], num_generations: int, sampling: Sampling) -> None:
        if num_generations < 1 or sampling.max_tokens < 1:
            raise RolloutError(
                f"num_generations={num_generations} and max_tokens={sampling.max_tokens}: both must be at least 1."
            )
        limit = getattr(self.config, "max_position_embeddings", None)
        for prompt in prompts:
            if not prompt.ids:
                raise RolloutError(f"Prompt {prompt.id!r} has no tokens: there is nothing to continue. Drop the row.")
            if limit is not None and len(prompt.ids) + sampling.max_tokens > limit:
                raise RolloutError(
                    f"Prompt {prompt.id!r} has {len(prompt.ids)} tokens; with max_tokens={sampling.max_tokens} that exceeds the "
                    f"model's {limit} positions. Lower max_completion_length, or drop long prompts with max_prompt_length."
                )
            if not 0 <= min(prompt.ids) <= max(prompt.ids) < self.config.vocab_size:
                raise RolloutError(
                    f"Prompt {prompt.id!r} holds a token id outside of the model's vocabulary of {self.config.vocab_size}. "
                    "The tokenizer is not this model's."
                )

    def _jobs(self, rows: Sequence[_Row], max_tokens: int) -> list[_Job]:
        """Rows by prompt ids, longest first (rows of like lengths waste least), split where a group alone is over budget."""
        by_ids: dict[tuple[int, ...], list[_Row]] = {}
        for row in rows:
            by_ids.setdefault(row.prompt.ids, []).append(row)
        jobs = []
        for ids in sorted(by_ids, key=len, reverse=True):
            most = max(1, self.max_batch_tokens // (len(ids) + max_tokens))
            jobs += [_Job(ids, by_ids[ids][i : i + most]) for i in range(0, len(by_ids[ids]), most)]
        return jobs

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, no dropout; afterwards every submodule is in the mode that it was in.

        Not `inference_mode`: a buffer that a model makes meanwhile would be unusable in training. The casts that autocast remembers are
        dropped for the same reason: they have no gradient.
        """
        training = [m for m in self.module.modules() if m.training]
        self.module.eval()
        try:
            with torch.no_grad(), self.autocast():
                yield
        finally:
            torch.clear_autocast_cache()
            for module in training:
                module.training = True

    def _rollouts(self, rows: Sequence[_Row]) -> list[Rollout]:
        """A finished group."""
        bodies = [row.tokens[:-1] if row.finish == "stop" else row.tokens for row in rows]
        texts = self.tokenizer.batch_decode(bodies, skip_special_tokens=True)
        return [self._rollout(row, text) for row, text in zip(rows, texts, strict=True)]

    def _rollout(self, row: _Row, text: str) -> Rollout:
        assert row.finish is not None
        completion = Completion(tuple(row.tokens), tuple(row.logprobs), row.finish, text, self.version)
        return Rollout(row.prompt, completion, row.index)


class _Decoder:
    """What both ways of decoding share: drawing the next tokens of some rows and writing them down; `on_row` gets finished ones."""

    def __init__(self, engine: LocalEngine, sampling: Sampling, on_row: Callable[[_Row], None]) -> None:
        self.engine, self.module, self.sampling, self.on_row = engine, engine.module, sampling, on_row
        self.device = next(engine.module.parameters()).device
        self.tokens = self.finished = 0

    def draw(self, hidden: torch.Tensor, rows: Sequence[_Row]) -> None:
        """Draws the next token of every unfinished row from hidden [B, d]; a step's one wait for the device is here."""
        u = None
        if self.sampling.temperature > 0:
            u = torch.tensor([next(row.uniforms) for row in rows], dtype=torch.float64).to(self.device)
        size = max(1, _LOGITS // self.engine.config.vocab_size)
        drawn = []
        for i in range(0, len(rows), size):
            logits = self.module.head_logits(hidden[i : i + size])
            tokens, logprobs = draw(logits, self.sampling, None if u is None else u[i : i + size])
            drawn.append(torch.stack((tokens.double(), logprobs.double())))
        for row, token, logprob in zip(rows, *torch.cat(drawn, 1).tolist()):
            if row.finish is None:
                self._record(row, int(token), logprob)
        if self.engine.progress is not None:
            self.engine.progress(self.tokens, self.finished)

    def _record(self, row: _Row, token: int, logprob: float) -> None:
        if token < 0:
            raise RolloutError(
                f"The model's logits for prompt {row.prompt.id!r}, token {len(row.tokens)} of sample {row.index}, are not finite. "
                "Its weights have diverged, or overflow in this number type: lower the learning rate, or use bfloat16 for float16."
            )
        row.tokens.append(token)
        row.logprobs.append(logprob)
        row.slot += 1
        self.tokens += 1
        if token in self.engine.stop_token_ids:
            row.finish = "stop"
        elif len(row.tokens) == self.sampling.max_tokens:
            row.finish = "length"
        if row.finish is not None:
            self.finished += 1
            self.on_row(row)


class _PackedDecoder(_Decoder):
    """All rows in one `DecodeCache`; rows leave when finished and join as the budget allows."""

    def run(self, jobs: Sequence[_Job]) -> None:
        self.cache = DecodeCache()
        self.rows: list[_Row] = []
        waiting = deque(jobs)
        while True:
            live = [i for i, row in enumerate(self.rows) if row.finish is None]
            # Leaving out finished rows costs one copy of the cache, so an eighth of the rows must have finished.
            if 8 * (len(self.rows) - len(live)) < len(self.rows):
                self._step()
                continue
            admitted = self._admissible(waiting, live)
            if not live and not admitted:
                return
            self._rebuild(live, admitted)

    def _admissible(self, waiting: deque[_Job], live: Sequence[int]) -> list[_Job]:
        """Takes the jobs that fit the budget beside the live rows; one at least where there are none."""
        count = len(live)
        longest = max((len(self.rows[i].prompt.ids) for i in live), default=0)
        admitted: list[_Job] = []
        while waiting:
            job = waiting[0]
            longest, alone, count = max(longest, len(job.ids)), count == 0, count + len(job.rows)
            if not alone and count * (longest + self.sampling.max_tokens) > self.engine.max_batch_tokens:
                break
            admitted.append(waiting.popleft())
        return admitted

    def _rebuild(self, live: list[int], admitted: Sequence[_Job]) -> None:
        """Drops finished rows, then prefills new ones behind those that stay and draws their first tokens."""
        self.rows = [self.rows[i] for i in live]
        new = [row for job in admitted for row in job.rows]
        self.cache.resize(live, len(new), self._capacity([row.slot for row in self.rows + new]))
        if not new:
            return
        hidden = []
        for jobs in _parts(admitted, _PREFILL_TOKENS):
            hidden.append(self._prefill(jobs, first_row=len(self.rows)))
            self.rows += [row for job in jobs for row in job.rows]
        self.draw(torch.cat(hidden), new)

    def _prefill(self, jobs: Sequence[_Job], first_row: int) -> torch.Tensor:
        """Runs distinct prompts, laid end to end; [rows, d]: the last hidden state of each row's prompt."""
        ends = np.cumsum([0] + [len(job.ids) for job in jobs])
        longest = max(len(job.ids) for job in jobs)
        document = np.repeat(np.arange(len(jobs)), [len(job.rows) for job in jobs])
        last = ends[document + 1] - 1
        # Slots behind a shorter prompt get copies of its last token: masked, then overwritten by the completion.
        source = np.minimum(ends[document][:, None] + np.arange(longest), last[:, None])
        ids = np.concatenate([np.asarray(job.ids, np.int64) for job in jobs])
        positions = np.concatenate([np.arange(len(job.ids)) for job in jobs])
        bounds = tuple(ends.tolist())
        layout = PackedLayout(torch.tensor(bounds, dtype=torch.int32, device=self.device), bounds, longest)
        self.cache.begin_prefill(first_row, self._to_device(source))
        hidden = self._hidden(self._to_device(ids)[None], self._to_device(positions)[None], layout)
        self.module.check_packed(layout)
        return hidden[0, self._to_device(last)]

    def _step(self) -> None:
        """Runs the newest tokens of all rows through the model and draws the next ones (finished rows idle)."""
        slots = [row.slot for row in self.rows]
        if max(slots) >= self.cache.capacity:
            self.cache.resize(range(len(self.rows)), 0, self._capacity(slots))
        ids, positions = self._to_device(np.array([[row.tokens[-1] for row in self.rows], slots]))
        self.cache.begin_decode(positions, max(slots))
        hidden = self._hidden(ids[:, None], positions[:, None], DecodeLayout(positions, min(slots), max(slots)))
        self.draw(hidden[:, 0], self.rows)

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, layout: PackedLayout | DecodeLayout) -> torch.Tensor:
        backbone = self.module.backbone
        return backbone(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, layout=layout
        ).last_hidden_state

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    @staticmethod
    def _capacity(slots: Sequence[int]) -> int:
        return (max(slots) // BLOCK + 1) * BLOCK


def _parts(jobs: Sequence[_Job], tokens: int) -> Iterator[list[_Job]]:
    """Consecutive jobs of at most `tokens` prompt tokens together; a longer one comes alone."""
    part: list[_Job] = []
    size = 0
    for job in jobs:
        if part and size + len(job.ids) > tokens:
            yield part
            part, size = [], 0
        part.append(job)
        size += len(job.ids)
    yield part


class _PlainDecoder(_Decoder):
    """Rows of equally long prompts together until the last one has finished, with the cache that the model itself makes.

    A model that keeps its state in another way (Mamba, RWKV) is run over the whole sequence for every token.
    """

    def run(self, jobs: Sequence[_Job]) -> None:
        by_length: dict[int, list[_Row]] = {}
        for job in jobs:
            by_length.setdefault(len(job.ids), []).extend(job.rows)
        for length, rows in by_length.items():
            most = max(1, self.engine.max_batch_tokens // (length + self.sampling.max_tokens))
            for i in range(0, len(rows), most):
                self._decode(rows[i : i + most])

    def _decode(self, rows: Sequence[_Row]) -> None:
        ids = torch.tensor([row.prompt.ids for row in rows], dtype=torch.int64, device=self.device)
        state: dict[str, Any] = {}
        while True:
            out = self.module.backbone(input_ids=ids, use_cache=True, **state)
            self.draw(out.last_hidden_state[:, -1], rows)
            if all(row.finish is not None for row in rows):
                return
            newest = torch.tensor([row.tokens[-1:] for row in rows], dtype=torch.int64, device=self.device)
            if getattr(out, "past_key_values", None) is None:
                ids = torch.cat((ids, newest), 1)
            else:
                ids, state = newest, {"past_key_values": out.past_key_values}
