"""Where the frozen model that a KL or a preference is relative to is kept."""

from __future__ import annotations

from pydantic import Field

from llmrl.config.base import Strict
from llmrl.config.model import LoraSettings


class ReferenceFields(Strict):
    """Reference."""

    offload_reference: bool = Field(
        False, description="keep the frozen reference in host memory; it is on the GPU only while it scores"
    )

    def check_offload(self, none_because: str) -> None:
        """Raises ValueError where `offload_reference` has no model to move; `none_because` says why there is none, "" if there is one."""
        if self.offload_reference and none_because:
            raise ValueError(f"offload_reference: {none_because}, so there is nothing to move; leave it out")


def adapter_is_reference(lora: LoraSettings | None) -> str:
    """Why a recipe with adapters keeps no reference, "" without them."""
    return "" if lora is None else "with lora the reference is the model without its adapter"
