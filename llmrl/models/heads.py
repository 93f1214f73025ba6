"""The output layer of a causal language model: its weight and what the model does to the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrl.errors import ConfigError
from llmrl.functional.logprobs import linear_logprobs, linear_weighted_nll


class Head:
    """logits = softcap(scale * (hidden W^T + bias)), with W looked up at every call: adapters may be switched on or off.

    Raises ConfigError where the output layer is not a plain linear one.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self._model = model
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = (
            (getattr(config, "logit_scale", None) or 1.0)  # Cohere
            * (getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
            / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
        )
        self.linear()

    def linear(self) -> nn.Linear:
        """The linear layer that is in use."""
        head = self._model.get_output_embeddings()
        if hasattr(head, "modules_to_save"):  # peft's full copy, beside the original
            head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
        if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
            raise ConfigError(
                f"The output layer of {type(self._model).__name__} is a {type(head).__name__}; log-probs are computed from a plain "
                "linear layer. With LoRA, leave lm_head out of target_modules, or train it in full: modules_to_save: [lm_head]."
            )
        return head

    def logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of targets [K] and entropies [K] from hidden [K, D]; see `linear_logprobs`."""
        layer = self.linear()
        return linear_logprobs(
            hidden, layer.weight, targets, bias=layer.bias, temperature=temperature, softcap=self.softcap,
            logit_scale=self.scale, entropy=entropy,
        )  # fmt: skip

    def weighted_nll(
        self, hidden: Tensor, targets: Tensor, weights: Tensor, *, temperature: float, loss_type: Any
    ) -> tuple[Tensor, Tensor]:
        """Scalar loss and the negative log-likelihoods [K]; see `linear_weighted_nll`."""
        layer = self.linear()
        return linear_weighted_nll(
            hidden, layer.weight, targets, weights, loss_type=loss_type, bias=layer.bias, temperature=temperature,
            softcap=self.softcap, logit_scale=self.scale,
        )  # fmt: skip

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] in float32 at least, at temperature 1, from hidden [..., D]: for sampling, without a gradient in mind."""
        layer = self.linear()
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(layer.weight.dtype)
        logits = F.linear(hidden, layer.weight, layer.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
