"""Named methods as data: a name -> a value for each axis of `GRPOConfig`. No code.

Sources: grpo arXiv 2402.03300 (beta 0.04, k3 in the loss); dr_grpo arXiv 2503.20783; dapo arXiv 2503.14476.
DAPO's soft overlong punishment is a reward: add `soft_overlong` to `rewards`.
"""

from __future__ import annotations

from typing import Any

_GRPO: dict[str, Any] = {
    "scale_rewards": "group",
    "aggregation": "seq_mean_token_mean",
    "beta": 0.04,
    "kl_estimator": "k3",
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "dual_clip": None,
    "importance_sampling_level": "token",
    "group_filter": "none",
    "truncated_completions": "keep",
}

GRPO_PRESETS: dict[str, dict[str, Any]] = {
    "grpo": _GRPO,
    "dr_grpo": {**_GRPO, "scale_rewards": "none", "aggregation": "constant", "beta": 0.0},
    "dapo": {
        **_GRPO,
        "aggregation": "token_mean",
        "beta": 0.0,
        "epsilon_high": 0.28,
        "group_filter": "drop_zero_std",
    },
}
