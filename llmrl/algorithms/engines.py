"""Makes the engine that a recipe names, and compares it with the trainer after every weight sync."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrl.algorithms.base import Trainer
from llmrl.data.sampler import permutation
from llmrl.errors import ConfigError, DivergenceError
from llmrl.models.forward import PolicyModule
from llmrl.rollout.local import LocalEngine
from llmrl.types import Completion, Example, RolloutEngine, Sampling

GAP_CAUSES = (
    "Likely causes: the engine samples with other weights than the trainer's (an update was lost, came half, or was undone), another "
    "temperature, a truncated support, another model, chat template or tokenizer, or a model whose decode path differs from its training path. "
    "`llmrl doctor KIND --config RECIPE` tells them apart"
)

_BOUNDS = {torch.bfloat16: 0.1, torch.float16: 0.05}
_CANARY_TOKENS, _CANARY_PROMPT = 16, 272
"""Tokens sampled, and of the prompt at most: two blocks of the largest prefix cache (128 on the CPU), and then some."""


def make_engine(trainer: Trainer, policy: PolicyModule, max_length: int) -> RolloutEngine:
    """The engine of `config.rollout`; `max_length` is that of the longest prompt with its completion, in tokens.

    Waits for servers that are not up. Raises ConfigError and RolloutError for ones that can't serve this model.
    """
    config, backend = trainer.config, trainer.backend
    settings = config.rollout
    if settings.engine == "local":
        return LocalEngine(
            policy,
            trainer.tokenizer,
            stop_token_ids=trainer.stop_ids,
            max_batch_tokens=settings.max_batch_tokens,
            autocast=backend.autocast,
            twin=trainer.twin(policy),
        )
    shared: dict[str, Any] = {
        "stop_token_ids": trainer.stop_ids,
        "rank": backend.rank,
        "world_size": backend.world_size,
    }
    if settings.engine == "vllm_server":
        from llmrl.rollout.vllm_engine import VLLMServerEngine

        engine = VLLMServerEngine(
            settings,
            trainer.tokenizer,
            model=describe(trainer.model),
            output_dir=Path(config.output_dir),
            gather=backend.gather_json,
            progress=trainer.run.progress.message,
            **shared,
        )
        if max_length > engine.max_model_len:
            engine.close()
            raise ConfigError(
                f"the longest prompt and max_completion_length {config.max_completion_length} make {max_length} tokens, and the servers of "
                f"rollout.urls take {engine.max_model_len}. Start them with --max-model-len {max_length} or more, or lower "
                "max_completion_length or max_prompt_length"
            )
        return engine
    from llmrl.rollout.vllm_colocate import ColocatedEngine

    directory = Path(tempfile.mkdtemp(prefix="llmrl-model-"))
    try:
        trainer.model.config.save_pretrained(directory)
        trainer.tokenizer.save_pretrained(directory)
        return ColocatedEngine(
            settings,
            trainer.tokenizer,
            model_path=str(directory),
            max_model_len=max_length,
            seed=config.seed,
            **shared,
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def describe(model: Any) -> dict[str, Any]:
    """What an engine's model must have in common with the trainer's."""
    text = model.config.get_text_config()
    return {k: getattr(text, k) for k in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")}


def gap_bound(config: Any, model: Any, engine_dtype: torch.dtype | None) -> float:
    """The mean |sampled - recomputed log-prob| in nats beyond which a run stops: the recipe's, or by the coarsest number type in play.

    The model's own type, not the recipe's: a model that was handed in has the one that it has.
    """
    if config.max_logprob_gap is not None:
        return config.max_logprob_gap
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtypes |= {{"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]}
    dtypes |= {engine_dtype} if engine_dtype is not None else set()
    return max((_BOUNDS.get(dtype, 1e-3) for dtype in dtypes), default=1e-3)


class Canary:
    """A fixed prompt that every copy of the weights continues after a sync; the trainer scores the same tokens.

    The prompt is the same each time, so a prefix cache that outlived its weights shows as well.
    """

    def __init__(self, trainer: Trainer, engine: RolloutEngine, max_length: int, bound: float) -> None:
        self.trainer, self.engine, self.bound = trainer, engine, bound
        vocabulary = trainer.model.config.get_text_config().vocab_size
        length = max(1, min(_CANARY_PROMPT, max_length - _CANARY_TOKENS))
        ids = permutation(vocabulary, seed=0)
        self.ids = tuple(int(i) for i in np.resize(ids, length))
        self.max_tokens = min(_CANARY_TOKENS, max(1, max_length - length))

    def check(self, version: int) -> dict[str, float]:
        """`sampling/canary_gap`: the largest mean |sampled - recomputed| in nats over the copies, on all processes.

        Raises DivergenceError on every process when it is over the bound.
        """
        config, backend = self.trainer.config, self.trainer.backend
        sampling = Sampling(self.max_tokens, temperature=config.temperature, seed=config.seed, step=version)
        found = backend.together(lambda: self.engine.probe(self.ids, sampling))
        scored = self.trainer.score(
            [self._example(completion) for completion in found],
            lambda module, batch: module(batch, temperature=config.temperature),
            {"logprobs": "logprobs"},
        )
        gaps = [
            float(np.abs(e.payload["logprobs"] - e.payload["sampled_logprobs"])[e.loss_mask].mean()) for e in scored
        ]
        every = [gap for part in backend.gather_json(gaps) for gap in part]
        if not every:
            return {}
        worst = max(every, key=lambda gap: gap if gap == gap else np.inf)
        if not worst <= self.bound:
            raise DivergenceError(
                f"after the sync of weights {version}, engine and trainer differ by {worst:.3g} nats a token on fixed tokens, over "
                f"max_logprob_gap {self.bound:.3g}. {GAP_CAUSES}"
            )
        return {"sampling/canary_gap": worst}

    def _example(self, completion: Completion) -> Example:
        n = len(self.ids)
        ids = np.asarray(self.ids + completion.ids, dtype=np.int32)
        sampled = np.zeros(len(ids), dtype=np.float32)
        sampled[n:] = completion.sampled_logprobs
        return Example(ids, np.arange(len(ids)) >= n, payload={"sampled_logprobs": sampled})


def engine_metrics(engine: RolloutEngine) -> Mapping[str, float]:
    """What the engine counted since the last call."""
    pop = getattr(engine, "pop_metrics", None)
    return pop() if pop is not None else {}
