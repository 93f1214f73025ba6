"""The one place where a loss gets its denominator.

A loss is sum_t w_t x_t over tokens. The weights are made for a whole update, with counts over all processes, before anything is
cut into microbatches: then no cut, no gradient accumulation and no number of processes can change the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

WeightRule = Callable[[int, float, float, float], float]

# (tokens of the sequence, tokens of the update, sequences of the update, constant L) -> weight of each token of the sequence
AGGREGATIONS: dict[str, WeightRule] = {
    # mean over all tokens of the update (DAPO, Yu et al. 2025, arXiv 2503.14476, equation 12)
    "token_mean": lambda n, tokens, sequences, constant: 1.0 / tokens,
    # mean over the sequences of each one's mean over its tokens (GRPO, Shao et al. 2024, arXiv 2402.03300, equation 3)
    "seq_mean_token_mean": lambda n, tokens, sequences, constant: 1.0 / (sequences * n),
    # mean over the sequences of each one's sum over its tokens
    "seq_mean_token_sum": lambda n, tokens, sequences, constant: 1.0 / sequences,
    # sum over all tokens / (sequences * L), L a constant such as the length limit (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783)
    "constant": lambda n, tokens, sequences, constant: 1.0 / (sequences * constant),
}


def token_weights(
    kind: str,
    lengths: Sequence[int],
    *,
    total_tokens: float,
    total_sequences: float,
    constant: float | None = None,
) -> list[float]:
    """One weight a sequence, which each of its tokens gets; 0 for a sequence without tokens.

    `lengths` counts the tokens in the loss of each of this process's sequences; the totals are those of the whole update over
    all processes. `constant` is L and only "constant" needs it. Raises ValueError for an unknown kind, totals smaller than the
    lengths, or a missing constant.

    Example: token_weights("token_mean", [1, 3], total_tokens=4, total_sequences=2) == [0.25, 0.25]
    """
    if kind not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {kind!r}; known: {', '.join(AGGREGATIONS)}")
    if kind == "constant" and not (constant and constant > 0):
        raise ValueError(f'aggregation "constant" divides by a constant length; it is {constant}, give a positive one')
    if total_tokens < sum(lengths) or total_sequences < sum(n > 0 for n in lengths):
        raise ValueError(
            f"totals over all processes ({total_tokens} tokens, {total_sequences} sequences) are smaller than what this process "
            f"has ({sum(lengths)} tokens, {sum(n > 0 for n in lengths)} sequences): sum them up before weighing"
        )
    rule = AGGREGATIONS[kind]
    return [rule(n, total_tokens, total_sequences, constant or 1.0) if n > 0 else 0.0 for n in lengths]
