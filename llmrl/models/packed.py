"""What every module that calls a Hugging Face model shares: packed tokens in, hidden states out, checked against the model itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.errors import ConfigError
from llmrl.models.attention import NAME, PackedLayout
from llmrl.models.packing import packing_support, sliding_layers
from llmrl.types import PackedBatch


class PackedModel(nn.Module):
    """Wraps a Hugging Face model with or without adapters. `packing` says how documents go through it (see `packing_support`).

    Making one compares a few tokens with the model's own forward, and so refuses, by name, a model whose output or attention llmrl
    would get wrong (skipped where weights are sharded or on "meta"). Auxiliary losses of mixtures of experts are not computed.
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
        self._parts = (base, self._output_layer(base))  # in a tuple, so that no parameter is registered twice
        if _materialised(model):
            self._self_check()
        if self.packing == "packed":
            base.set_attn_implementation(NAME)

    @property
    def base(self) -> Any:
        """The Hugging Face model, without the adapter around it."""
        return self._parts[0]

    @property
    def backbone(self) -> nn.Module:
        """The model without its output layer; its `last_hidden_state` is what that reads."""
        return self._parts[0].base_model

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """[T, D]: the hidden states that the output layer reads, every document by itself, behind its prefix if it has one."""
        layout = PackedLayout(batch.cu_seqlens, batch.cu_seqlens_host, batch.max_seqlen, batch.prefixes)
        if self.packing == "packed":
            hidden = self.backbone(
                input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, layout=layout
            ).last_hidden_state[0]
            self.check_packed(layout)
            return hidden
        outs = []
        prefixes = batch.prefixes or [(0, 0)] * batch.num_sequences
        for (start, n), document in zip(prefixes, batch.input_ids.split(layout.lengths)):
            whole = torch.cat([batch.input_ids[start : start + n], document])
            outs.append(self.backbone(input_ids=whole[None], use_cache=False).last_hidden_state[0, n:])
        return torch.cat(outs)

    def check_packed(self, layout: PackedLayout) -> None:
        """Raises ConfigError unless every attention layer of the last forward used this layout."""
        config = self._parts[0].config.get_text_config()
        if len(layout.windows) != config.num_hidden_layers:
            raise ConfigError(
                f"{len(layout.windows)} of {config.num_hidden_layers} attention layers of {config.model_type!r} saw the documents' "
                "bounds: the others would have attended across documents. Was the attention implementation changed after the "
                "model was given to llmrl?"
            )

    @abstractmethod
    def _output_layer(self, base: Any) -> Any:
        """What turns hidden states into the model's output; raises ConfigError for what is not understood."""

    @abstractmethod
    def _own_output(self, base: Any, document: Tensor) -> Tensor:
        """The model's own output at every token of one document [L]: [L, outputs]."""

    @abstractmethod
    def _output(self, hidden: Tensor) -> Tensor:
        """The same from hidden states [T, D]."""

    @torch.no_grad()
    def _self_check(self) -> None:
        """Three and two tokens, through llmrl and through the model as it is: the same output, or a ConfigError by name."""
        base = self._parts[0]
        name = f"{type(base).__name__} ({base.config.model_type})"
        device = base.get_input_embeddings().weight.device
        lengths = (3, 2)
        ids = torch.arange(1, sum(lengths) + 1, device=device) % base.config.get_text_config().vocab_size
        with _evaluating(self), torch.autocast(device.type, enabled=False):
            if self.packing == "packed":
                base.set_attn_implementation("eager")
            want = torch.cat([self._own_output(base, d) for d in ids.split(lengths)])
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
            got = self._output(self.hidden_states(batch))
            if self.packing == "packed":
                self._check_windows(name)
        want = want.to(got.dtype)
        gap = float((got - want).norm() / want.norm().clamp_min(1e-30))
        bound = 0.05 if base.dtype in (torch.bfloat16, torch.float16) else 1e-2 if device.type != "cpu" else 1e-4
        if gap > bound:  # weights that are not finite compare as neither; training and sampling name them
            raise ConfigError(
                f"The output of {name} differs by {gap:.2g} (relative) from what llmrl computes from its hidden states: its output "
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
