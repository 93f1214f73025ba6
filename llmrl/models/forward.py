"""The one module through which a model is called: packed tokens in, log-probs at the positions of the loss out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmrl.errors import ConfigError
from llmrl.models.attention import NAME, PackedLayout
from llmrl.models.heads import Head
from llmrl.models.packing import packing_support, sliding_layers
from llmrl.types import PackedBatch

# Named tuples, not dataclasses: wrappers like FSDP look for tensors in a module's outputs, and know tuples.


class TokenScores(NamedTuple):
    """Of the K tokens in the loss: logprobs [K], entropy [K] or None; both differentiable, in nats."""

    logprobs: Tensor
    entropy: Tensor | None


class WeightedNLL(NamedTuple):
    """loss: the differentiable scalar; nll [K]: the negative log-likelihoods, detached."""

    loss: Tensor
    nll: Tensor


class PolicyModule(nn.Module):
    """Wraps a Hugging Face causal LM, with or without adapters; a backend wraps this module, and every log-prob comes out of it.

    `packing` says how documents go through the model (see `packing_support`). Making one compares a few tokens with the model's own
    forward, and so refuses, by name, a model whose logits or attention llmrl would get wrong (skipped where weights are sharded or
    on "meta"). Auxiliary losses of mixtures of experts are not computed.

    Example: PolicyModule(model)(pack(examples), temperature=0.7).logprobs
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        self.has_adapter = peft
        if peft and model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
            raise ConfigError(
                f"{model.active_peft_config.peft_type} adds tokens to the prompt, which packed documents have no room for; use LoRA"  # type: ignore[union-attr]
            )
        base: Any = model.get_base_model() if peft else model  # type: ignore[operator]
        self.packing = packing_support(base.config, type(base))
        self._parts = (base, Head(base))  # in a tuple, so that no parameter is registered twice
        if _materialised(model):
            self._self_check()
        if self.packing == "packed":
            base.set_attn_implementation(NAME)

    @property
    def backbone(self) -> nn.Module:
        """The model without its head; its `last_hidden_state` is what the head reads."""
        return self._parts[0].base_model

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
    ) -> TokenScores | WeightedNLL:
        """Scores the tokens in the loss, or, given their `weights` [K], their weighted loss with its gradient made on the way.

        reference: by the model without its adapter, without a gradient. Raises ConfigError where there is no adapter.
        """
        with self._as_reference() if reference else nullcontext():
            positions = batch.positions()
            targets = batch.input_ids[positions]
            # What stands at t-1 predicts token t. This shift is nowhere else.
            hidden = self.hidden_states(batch)[positions - 1]
            if weights is None:
                return TokenScores(*self.head.logprobs(hidden, targets, temperature=temperature, entropy=entropy))
            loss = self.head.weighted_nll(hidden, targets, weights, temperature=temperature, loss_type=loss_type)
            return WeightedNLL(*loss)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """[T, D]: the hidden states that the head reads, every document by itself."""
        layout = PackedLayout(batch.cu_seqlens, batch.cu_seqlens_host, batch.max_seqlen)
        if self.packing == "packed":
            hidden = self.backbone(
                input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, layout=layout
            ).last_hidden_state[0]
            self.check_packed(layout)
            return hidden
        documents = batch.input_ids.split(layout.lengths)
        return torch.cat([self.backbone(input_ids=d[None], use_cache=False).last_hidden_state[0] for d in documents])

    def head_logits(self, hidden: Tensor) -> Tensor:
        """[..., V] float32 logits at temperature 1 from hidden [..., D], for sampling."""
        return self.head.logits(hidden)

    def check_packed(self, layout: PackedLayout) -> None:
        """Raises ConfigError unless every attention layer of the last forward used this layout."""
        config = self._parts[0].config.get_text_config()
        if len(layout.windows) != config.num_hidden_layers:
            raise ConfigError(
                f"{len(layout.windows)} of {config.num_hidden_layers} attention layers of {config.model_type!r} saw the documents' "
                "bounds: the others would have attended across documents. Was the attention implementation changed after the "
                "model was given to llmrl?"
            )

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        if not self.has_adapter:
            raise ConfigError(
                "reference=True runs the model without its adapter, but it has none; load a reference model"
            )
        with torch.no_grad(), self.model.disable_adapter():  # type: ignore[operator]
            yield

    @torch.no_grad()
    def _self_check(self) -> None:
        """Three and two tokens, through llmrl and through the model as it is: the same logits, or a ConfigError by name."""
        base = self._parts[0]
        name = f"{type(base).__name__} ({base.config.model_type})"
        device = base.get_input_embeddings().weight.device
        lengths = (3, 2)
        ids = torch.arange(1, sum(lengths) + 1, device=device) % base.config.get_text_config().vocab_size
        with _evaluating(self), torch.autocast(device.type, enabled=False):
            if self.packing == "packed":
                base.set_attn_implementation("eager")
            want = torch.cat([base(input_ids=d[None], use_cache=False).logits[0] for d in ids.split(lengths)])
            if self.packing == "packed":
                base.set_attn_implementation(NAME)
            bounds = (0, lengths[0], sum(lengths))
            batch = PackedBatch(
                input_ids=ids,
                position_ids=torch.cat([torch.arange(n, device=device) for n in lengths]),
                cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
                cu_seqlens_host=bounds,
                max_seqlen=max(lengths),
                unit_ids=torch.arange(2, device=device),
                loss_mask=torch.ones_like(ids, dtype=torch.bool),
            )
            got = self.head.logits(self.hidden_states(batch))
            if self.packing == "packed":
                self._check_windows(name)
        want = want.to(got.dtype)
        gap = float((got - want).norm() / want.norm().clamp_min(1e-30))
        bound = 0.05 if base.dtype in (torch.bfloat16, torch.float16) else 1e-2 if device.type != "cpu" else 1e-4
        if gap > bound:  # weights that are not finite compare as neither; training and sampling name them
            raise ConfigError(
                f"The logits of {name} differ by {gap:.2g} (relative) from what llmrl computes from its hidden states: its output "
                "layer or its attention does something that llmrl does not know. It can't be trained here."
            )

    def _check_windows(self, name: str) -> None:
        """A window that the model only puts into its mask, which is not made here, would be lost without a word."""
        config = self._parts[0].config
        device = self._parts[0].get_input_embeddings().weight.device
        layout = PackedLayout(torch.tensor([0, 1], dtype=torch.int32, device=device), (0, 1), 1)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.backbone(input_ids=token, position_ids=token, use_cache=False, layout=layout)
        found, wanted = sum(w is not None for w in layout.windows), sliding_layers(config)
        if found != wanted:
            raise ConfigError(
                f"{name} has {wanted} layers with a sliding window, of which {found} told the attention; it can't be packed"
            )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is in the mode that it was in."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _materialised(model: nn.Module) -> bool:
    """Whether every weight is here in full: not on "meta", not sharded by FSDP or ZeRO-3."""
    parameters = list(model.parameters())
    return not any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "placements") for p in parameters)
