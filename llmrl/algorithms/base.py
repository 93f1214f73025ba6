"""What every trainer sets up alike: backend, model, tokenizer, the module that is wrapped, and the run directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from llmrl.algorithms.benchmarks import Benchmarks
from llmrl.data.build import DataReport, rows_of
from llmrl.data.packing import cut, empty_example, pack, shard
from llmrl.errors import ConfigError
from llmrl.experience.batch import scatter, with_payload
from llmrl.models.forward import PolicyModule, TokenScores
from llmrl.models.load import (
    is_adapted,
    load_frozen,
    load_policy,
    load_reference,
    load_skeleton,
    read_weights,
    save_model,
    stop_token_ids,
)
from llmrl.models.shape import shape_of
from llmrl.models.twin import Twin
from llmrl.train.backend import Backend
from llmrl.train.run import Run
from llmrl.types import Example, PackedBatch

logger = logging.getLogger("llmrl")


class Trainer:
    """Base of the trainers. `model` and `tokenizer` default to what the recipe names; a model that was handed in is trained in place."""

    kind: str
    report: DataReport | None = None
    eval_report: DataReport | None = None

    def __init__(self, config: Any, *, model: Any = None, tokenizer: Any = None, callbacks: Sequence[Any] = ()) -> None:
        if (model is None) != (tokenizer is None):
            raise ConfigError(
                "give both model and tokenizer, or neither: the stop tokens and the chat template must match the weights"
            )
        self.config = config
        self.callbacks = list(callbacks)
        self.backend = Backend(config)
        if model is None:
            model, tokenizer = self.load()
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = stop_token_ids(model, tokenizer)
        self.attention = shape_of(model).attention_share
        self.module = self.wrap(model)

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer) that the recipe names."""
        config = self.config
        device = self.backend.load_device
        return self.backend.load(lambda: load_policy(config, device), lambda: load_skeleton(config))

    def wrap(self, model: Any) -> nn.Module:
        """The module that every forward goes through."""
        return PolicyModule(model)

    def prepare(
        self,
        total_steps: int,
        updates_per_step: int,
        stateful: dict[str, Any],
        *,
        modules: dict[str, nn.Module] | None = None,
        parts: Sequence[str] = (),
    ) -> None:
        """Wraps the module, builds the optimizer and opens the run directory; the last thing that a trainer's set-up does.

        `modules` are saved in checkpoints beside the model; for `parts` see `Backend.prepare`.
        """
        self.benchmarks = Benchmarks(self)
        self.backend.prepare(self.module, total_updates=total_steps * updates_per_step, parts=parts)
        self.run = Run(
            self.config,
            self.backend,
            kind=self.kind,
            total_steps=total_steps,
            stateful=stateful,
            modules=modules,
            gather_model=self.gather_model,
            load_model=self.read_model,
            callbacks=self.callbacks,
            trainer=self,
        )
        for what, report in (("training", self.report), ("evaluation", self.eval_report)):
            if report is not None:
                self.run.progress.message(f"{what} data: {report.summary()}")

    def read_examples(
        self, train: Any, evaluation: Any, build: Callable[..., tuple[list[Example], DataReport]], width: int = 1
    ) -> tuple[list[Example], list[Example]]:
        """(training, evaluation) examples of the recipe's data, or of rows or `Example`s that were handed in.

        `build(rows, max_length=what the model can take)` tokenises rows. Of `Example`s, each `width` that follow each other become
        a unit, whatever their maker wrote: microbatches are cut between units.
        """
        ready, ready_eval = _tokenised(train), _tokenised(evaluation)
        require(
            not (ready and self.config.eval_fraction),
            "eval_fraction can't hold out rows of a train_dataset of `Example`s: split it, and give the rest as eval_dataset",
        )
        rows, held_out = rows_of(self.config, [] if ready else train, [] if ready_eval else evaluation)
        require(len(rows) or ready, "no training rows: give `dataset` in the recipe or train_dataset")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if ready:
            examples = _as_units(train, width)
        else:
            examples, self.report = build(rows, max_length=limit)
        if ready_eval:
            return examples, _as_units(evaluation, width)
        if not held_out:
            return examples, []
        eval_examples, self.eval_report = build(held_out, max_length=limit)
        return examples, eval_examples

    def gather_model(self) -> Callable[[Path], None]:
        """What writes the model (the adapter alone, for LoRA) and the tokenizer into a directory, in the Hugging Face layout.

        All processes call this, which gathers a sharded model on the first; that one writes.
        """
        tensors = None
        if self.backend.strategy.shards_parameters:
            tensors = self.backend.whole_tensors(self.model, trained_only=is_adapted(self.model))
        return lambda path: save_model(self.model, self.tokenizer, path, tensors)

    def read_model(self, path: Path) -> None:
        """Sets the model to what `gather_model` wrote; all processes call it."""
        self.backend.fill(self.model, self.backend.load(lambda: read_weights(self.model, path), dict))

    def save_model(self, path: str | Path) -> None:
        """Writes the model now; all processes call it, the first one writes."""
        write = self.gather_model()
        self.backend.together(lambda: write(Path(path)) if self.backend.is_main else None)

    def twin(self, policy: PolicyModule) -> Twin | None:
        """What samples in this process: a plain copy of a sharded policy, None for the policy itself."""
        backend = self.backend
        if not backend.strategy.shards_parameters:
            return None
        return Twin(policy, backend.device, backend.strategy.layer_dtype)

    def microbatches(self, examples: Sequence[Example]) -> list[list[Example]]:
        """This process's examples, cut by the token budget."""
        return cut(examples, self.config.tokens_per_microbatch)

    def packed(self, examples: Sequence[Example]) -> PackedBatch:
        return pack(examples, device=self.backend.device)

    def share(self, examples: Sequence[Example]) -> list[Example]:
        """This process's part of examples that every process holds, balanced by cost."""
        return shard(examples, self.backend.rank, self.backend.world_size, self.attention)

    def score(
        self, examples: Sequence[Example], forward: Callable[[Any, PackedBatch], TokenScores], names: Mapping[str, str]
    ) -> list[Example]:
        """The examples with payloads from a pass without a gradient: `names` maps fields of TokenScores to payload names."""
        batches = self.microbatches(examples)
        scores = self.backend.score(
            batches, lambda module, batch: forward(module, self.packed(batch)), lambda: [empty_example()]
        )
        found: dict[int, Example] = {}
        for batch, out in zip(batches, scores):
            columns = {name: scatter(batch, getattr(out, field)) for field, name in names.items()}
            for i, e in enumerate(batch):
                found[id(e)] = with_payload(e, **{name: column[i] for name, column in columns.items()})
        return [found[id(e)] for e in examples]


class Reference:
    """The model that a KL or a preference is relative to: a frozen copy of what the policy is now, or the policy without its adapter.

    With `ref_model_name_or_path` in the recipe it is that model, which must know the tokens of `tokenizer`.
    """

    def __init__(self, model: Any, backend: Backend, config: Any, tokenizer: Any = None) -> None:
        name = getattr(config, "ref_model_name_or_path", None)
        if name is None:
            copy = load_reference(config, model)
        else:
            copy = backend.load(
                lambda: load_frozen(config, name, tokenizer),
                lambda: load_frozen(config, name, tokenizer, weights=False),
            )
        offload = config.offload_reference
        self.module = None if copy is None else backend.strategy.prepare_frozen(PolicyModule(copy), offload)
        # A sharded one comes and goes layer by layer; a whole one as a whole, around each pass (`with reference:`).
        self._away = self.module if offload and not backend.strategy.shards_parameters else None
        self._device = backend.device
        if copy is None and config.lora is None:
            logger.warning(
                "the reference is the model without its adapter, also without what the adapter had learnt before this run; to stay near "
                "the adapted model, merge it first (llmrl merge) and train a new adapter (lora: {r: 16}) on the result"
            )

    def __enter__(self) -> Reference:
        if self._away is not None:
            self._away.to(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._away is not None:
            self._away.to("cpu")

    def __call__(self, module: Any, batch: PackedBatch, *, temperature: float = 1.0) -> TokenScores:
        """Scores the tokens in the loss without a gradient; `module` is the wrapped policy."""
        if self.module is None:
            return module(batch, temperature=temperature, reference=True)
        return self.module(batch, temperature=temperature)


def _tokenised(rows: Any) -> bool:
    return isinstance(rows, Sequence) and len(rows) > 0 and isinstance(rows[0], Example)


def _as_units(examples: Sequence[Example], width: int) -> list[Example]:
    require(
        len(examples) % width == 0,
        f"{len(examples)} examples do not make units of {width}: give chosen and rejected in turn",
    )
    return [replace(e, unit=i // width) for i, e in enumerate(examples)]


def require(condition: Any, message: str) -> None:
    if not condition:
        raise ConfigError(message)
