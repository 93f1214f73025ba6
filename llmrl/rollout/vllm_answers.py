"""What is asked of vLLM for one group, and what of its answer can be trusted: of a server's, and of the one in this process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrl.errors import RolloutError, SyncError
from llmrl.rollout.sampling import group_seed
from llmrl.rollout.vllm_client import ServerFault, ServerGone
from llmrl.types import Prompt, Sampling

_ROUNDING = 1e-3
"""A log-prob may exceed 0 by rounding, in 16-bit logits."""


@dataclass(frozen=True)
class Weights:
    """The weights that requests ask for: `label` on the servers, RUN:VERSION (None before the first sync). With `adapter`, the name of an
    adapter, the label is only that of the base weights, of any version."""

    label: str | None = None
    version: int = 0
    adapter: str | None = None

    def held_under(self, label: str) -> bool:
        """Whether a server whose weights are labelled so can hold these."""
        if self.label is None or label == self.label:
            return True
        return self.adapter is not None and label.rpartition(":")[0] == self.label.rpartition(":")[0]


@dataclass(frozen=True)
class Answer:
    """One choice of an answer, checked: tokens, their log-probs and weight versions, all of one length.

    `version` is the oldest that has a part in it: that of a token, or the one that was asked for, under which its prompt may be cached.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool
    versions: tuple[int, ...]
    version: int


def check_request(
    prompts: Iterable[Prompt],
    num_generations: int,
    sampling: Sampling,
    *,
    max_model_len: int,
    vocab_size: int,
    remedy: str,
) -> None:
    """Raises RolloutError for what vLLM can't sample, or would sample otherwise. remedy: how its max_model_len is raised."""
    if num_generations < 1 or sampling.max_tokens < 1:
        raise RolloutError(
            f"num_generations={num_generations} and max_tokens={sampling.max_tokens}: both must be at least 1."
        )
    if 0 < sampling.temperature < 0.01:
        raise RolloutError(
            f"temperature {sampling.temperature}: vLLM raises it to 0.01, and log-probs would be of that. Use 0 (greedy) or 0.01."
        )
    for prompt in prompts:
        if not prompt.ids:
            raise RolloutError(f"Prompt {prompt.id!r} has no tokens: there is nothing to continue. Drop the row.")
        if len(prompt.ids) + sampling.max_tokens > max_model_len:
            raise RolloutError(
                f"Prompt {prompt.id!r} has {len(prompt.ids)} tokens; with max_tokens={sampling.max_tokens} that exceeds vLLM's "
                f"max_model_len of {max_model_len}. {remedy}, or lower max_completion_length."
            )
        if not 0 <= min(prompt.ids) <= max(prompt.ids) < vocab_size:
            raise RolloutError(
                f"Prompt {prompt.id!r} holds a token id outside of the model's vocabulary of {vocab_size}. "
                "The tokenizer is not this model's."
            )


def sampling_parameters(sampling: Sampling, prompt_id: str, n: int, stop_token_ids: Iterable[int]) -> dict[str, Any]:
    """vLLM's SamplingParams for a group of `n` completions, which it seeds with the group's seed plus their index."""
    return {
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "seed": group_seed(sampling, prompt_id),
        "logprobs": 0,
        "ignore_eos": True,  # whether the eos stops is for stop_token_ids to say
        "stop_token_ids": sorted(stop_token_ids),
        "detokenize": False,
    }


def check_completion(
    ids: Sequence[int],
    logprobs: Sequence[float],
    reason: str | None,
    *,
    max_tokens: int,
    stop_token_ids: frozenset[int],
    vocab_size: int,
) -> bool:
    """Whether a stop token ended the completion. Raises ValueError for one that can't be trained on."""
    if not 1 <= len(ids) <= max_tokens:
        raise ValueError(f"a completion has {len(ids)} tokens, and 1 to {max_tokens} were asked for")
    if not all(type(i) is int for i in ids) or not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"a token id is outside of the vocabulary of {vocab_size}")
    if len(logprobs) != len(ids):
        raise ValueError(f"{len(logprobs)} log-probs are not those of the {len(ids)} tokens")
    if not all(map(math.isfinite, logprobs)) or max(logprobs) > _ROUNDING:
        raise ValueError("a log-prob is not finite, or is positive")
    if not stop_token_ids.isdisjoint(ids[:-1]):
        raise ValueError("a completion goes on after a stop token")
    stopped = ids[-1] in stop_token_ids
    if reason != ("stop" if stopped else "length") or (not stopped and len(ids) < max_tokens):
        raise ValueError(
            f"finish_reason {reason!r} after {len(ids)} of {max_tokens} tokens, {'with' if stopped else 'without'} a stop token"
        )
    return stopped


def request_body(
    request_id: str, prompt: Prompt, n: int, sampling: Sampling, stop_token_ids: Iterable[int], weights: Weights
) -> dict[str, Any]:
    """The body of POST /inference/v1/generate for `n` completions."""
    body: dict[str, Any] = {
        "request_id": request_id,
        "token_ids": list(prompt.ids),
        # Blocks that were cached under other weights can't serve this request, even if a reset of the cache was lost.
        "cache_salt": weights.label or "default",
        "sampling_params": sampling_parameters(sampling, prompt.id, n, stop_token_ids),
    }
    return body if weights.adapter is None else {**body, "model": weights.adapter}


@dataclass(frozen=True)
class Reader:
    """Reads the answer to one request of `n` completions, which asked the server at `url` for `weights` of the run `run_id`."""

    url: str
    run_id: str
    weights: Weights
    n: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    vocab_size: int

    def read(self, answer: Mapping[str, Any]) -> list[Answer]:
        """The choices, in the order of their indexes. Raises ServerFault for an answer that breaks its promise, SyncError for one that was
        sampled with other weights, ServerGone for one of a server that was restarted."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            indexes = [choice["index"] for choice in choices]
            if indexes != list(range(self.n)):
                raise ValueError(f"it has choices {indexes} of {self.n} asked for")
            if self.weights.adapter is not None and answer["model"] != self.weights.adapter:
                raise ValueError(f"it is of model {answer['model']!r}, not of the adapter {self.weights.adapter!r}")
            return [self._choice(choice) for choice in choices]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ServerFault(self.url, f"the answer to a generate request breaks its promise: {what}") from error

    def _choice(self, choice: Mapping[str, Any]) -> Answer:
        """Raises ValueError, or what comes of reading something else than JSON of the right form, for a choice that can't be used."""
        ids, content = choice["token_ids"], choice["logprobs"]["content"]
        if [entry["token_id"] for entry in content] != ids:
            raise ValueError(f"{len(content)} log-probs are not those of the {len(ids)} tokens")
        logprobs = [entry["logprob"] for entry in content]
        stopped = check_completion(
            ids,
            logprobs,
            choice["finish_reason"],
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            vocab_size=self.vocab_size,
        )
        versions = self._versions(choice["weight_versions"], len(ids))
        oldest = min(self.weights.version, *versions)
        return Answer(tuple(ids), tuple(min(p, 0.0) for p in logprobs), stopped, versions, oldest)

    def _versions(self, spans: Sequence[Mapping[str, Any]], n: int) -> tuple[int, ...]:
        versions: list[int] = []
        for span in spans:
            if span["start"] != len(versions) or span["end"] <= span["start"]:
                raise ValueError("its weight versions do not cover its tokens")
            versions += [self._version(str(span["version"]))] * (span["end"] - span["start"])
        if len(versions) != n:
            raise ValueError(f"its weight versions cover {len(versions)} of {n} tokens")
        return tuple(versions)

    def _version(self, label: str) -> int:
        """The version that a label names; not one older than the request, and not of another run."""
        asked = self.weights
        if label == "default":
            if asked.label is None:
                return asked.version
            # Only a server that restarted says so: it is given the weights again before it is used.
            raise ServerGone(
                self.url, f"it was restarted: it samples with the weights it was started with, not {asked.label}"
            )
        run, _, number = label.rpartition(":")
        if run == self.run_id and number.isdigit():
            if asked.adapter is not None:
                return asked.version
            if int(number) >= asked.version:
                return int(number)
        raise SyncError(
            f"{self.url} sampled with weights {label!r}; those of {asked.label or 'its start'} were asked for. "
            + (
                "An update was lost or undone. Restart the server; the same command then continues from the last checkpoint."
                if run == self.run_id
                else "Another training run sends weights to this server, or did before: give each run servers of its own, and restart this one."
            )
        )
