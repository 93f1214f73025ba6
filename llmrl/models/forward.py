"""The one module through which a policy is called: packed tokens in, log-probs at the positions of the loss out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmrl.errors import ConfigError
from llmrl.models.heads import Head, ScalarHead
from llmrl.models.packed import PackedModel
from llmrl.types import PackedBatch

# Named tuples, not dataclasses: wrappers like FSDP look for tensors in a module's outputs, and know tuples.


class TokenScores(NamedTuple):
    """Of the K tokens in the loss, all differentiable: logprobs [K] and entropy [K] (or None) in nats, values [K] (or None).

    values[k] is V(s), s being everything before token k.
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None = None


class WeightedNLL(NamedTuple):
    """loss: the differentiable scalar; nll [K]: the negative log-likelihoods, detached."""

    loss: Tensor
    nll: Tensor


class PolicyModule(PackedModel):
    """Wraps a Hugging Face causal LM; a backend wraps this module, and every log-prob comes out of it.

    `value_head` adds a critic on the policy's own trunk.

    Example: PolicyModule(model)(pack(examples), temperature=0.7).logprobs
    """

    def __init__(self, model: nn.Module, value_head: ScalarHead | None = None) -> None:
        super().__init__(model)
        self.value_head = value_head

    @property
    def head(self) -> Head:
        return self._parts[1]

    def forward(
        self,
        batch: PackedBatch,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        weights: Tensor | None = None,
        loss_type: Literal["nll", "dft"] = "nll",
        reference: bool = False,
        values: bool = False,
    ) -> TokenScores | WeightedNLL:
        """Scores the tokens in the loss, or, given their `weights` [K], their weighted loss with its gradient made on the way.

        reference: by the model without its adapter, without a gradient. Raises ConfigError where there is no adapter.
        values: from the value head; their gradient reaches the trunk.
        """
        with self._as_reference() if reference else nullcontext():
            targets = batch.input_ids[batch.positions()]
            hidden = self.hidden_states(batch)[batch.predecessors()]
            if weights is not None:
                return WeightedNLL(
                    *self.head.weighted_nll(hidden, targets, weights, temperature=temperature, loss_type=loss_type)
                )
            scores = self.head.logprobs(hidden, targets, temperature=temperature, entropy=entropy)
            if not values:
                return TokenScores(*scores)
            if self.value_head is None:
                raise ConfigError("values were asked of a policy without a value head; give PolicyModule one")
            return TokenScores(*scores, values=self.value_head(hidden))

    def head_logits(self, hidden: Tensor) -> Tensor:
        """[..., V] float32 logits at temperature 1 from hidden [..., D], for sampling."""
        return self.head.logits(hidden)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        if not self.has_adapter:
            raise ConfigError(
                "reference=True runs the model without its adapter, but it has none; load a reference model"
            )
        # Not peft's disable_adapter: it sets requires_grad, of whichever tensor a sharding backend has put into a parameter's place.
        layers: list[Any] = [m for m in self.model.modules() if hasattr(m, "_disable_adapters")]
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            with torch.no_grad():
                yield
        finally:
            for layer, was in zip(layers, before):
                layer._disable_adapters = was

    def _output_layer(self, base: Any) -> Head:
        return Head(base)

    def _own_output(self, base: Any, document: Tensor) -> Tensor:
        return base(input_ids=document[None], use_cache=False).logits[0]

    def _output(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)
