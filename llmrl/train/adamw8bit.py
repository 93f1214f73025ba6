"""AdamW whose moments are kept in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), by bitsandbytes. Imported where a recipe asks for it."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit

from llmrl.errors import ConfigError

MIN_SIZE = 4096  # elements; of smaller tensors the moments stay in 32 bits, as they do for groups of "optim_bits" 32


class BlockwiseAdamW(AdamW8bit):
    """bitsandbytes' optimizer with `optim_bits` a key of each group, and with a state that goes through plain tensors.

    State of a parameter: `step`, a number; `state1` and `state2`, the moments, uint8 or float32 in the parameter's shape; where they
    are uint8, `absmax1` and `absmax2`, one float32 for each block of 256 elements, and `qmap1` and `qmap2`, the 256 values of a code.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, min_8bit_size=MIN_SIZE, **settings)

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        return {**super().get_config(gindex, pindex, group), "optim_bits": group["optim_bits"]}

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizers give it: the state of a parameter in one mapping."""
        return torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Numbers of steps may be tensors. Raises ConfigError where the state is another optimizer's."""
        if any("state1" not in entry for entry in state_dict["state"].values()):
            raise ConfigError(
                "the checkpoint has no moments in 8 bits: it is of a run with another `optimizer` than adamw_8bit. Resume with that one"
            )
        super().load_state_dict(state_dict, move_to_device)
        for state in self.state.values():
            state["step"] = int(state["step"])  # the kernels take no tensor
