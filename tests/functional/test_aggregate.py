"""Weights of tokens: by hand, and against the loss that each aggregation is defined as."""

import pytest
import torch

from llmrl.functional.aggregate import AGGREGATIONS, token_weights

LENGTHS = [1, 4, 3]


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("token_mean", [1 / 8, 1 / 8, 1 / 8]),
        ("seq_mean_token_mean", [1 / 3, 1 / 12, 1 / 9]),
        ("seq_mean_token_sum", [1 / 3, 1 / 3, 1 / 3]),
        ("constant", [1 / 48, 1 / 48, 1 / 48]),
    ],
)
def test_by_hand(kind, want):
    assert token_weights(kind, LENGTHS, total_tokens=8, total_sequences=3, constant=16) == pytest.approx(
        want, rel=1e-15
    )


def test_against_the_definitions():
    x = [torch.rand(n, dtype=torch.float64) for n in LENGTHS]
    definitions = {
        "token_mean": torch.cat(x).mean(),
        "seq_mean_token_mean": torch.stack([s.mean() for s in x]).mean(),
        "seq_mean_token_sum": torch.stack([s.sum() for s in x]).mean(),
        "constant": torch.cat(x).sum() / (3 * 16),
    }
    assert set(definitions) == set(AGGREGATIONS)
    for kind, want in definitions.items():
        weights = token_weights(kind, LENGTHS, total_tokens=8, total_sequences=3, constant=16)
        assert sum(w * s.sum().item() for w, s in zip(weights, x)) == pytest.approx(want.item(), rel=1e-14)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_cuts_share_the_denominator(kind):
    totals = {"total_tokens": 8, "total_sequences": 3, "constant": 16}
    whole = token_weights(kind, LENGTHS, **totals)
    assert whole == [w for n in LENGTHS for w in token_weights(kind, [n], **totals)]


def test_empty_sequences_weigh_nothing_and_need_no_totals():
    assert token_weights("token_mean", [0, 2], total_tokens=2, total_sequences=1) == [0.0, 0.5]
    assert token_weights("seq_mean_token_mean", [0], total_tokens=0, total_sequences=0) == [0.0]
    assert token_weights("token_mean", [], total_tokens=0, total_sequences=0) == []


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="token_sum"):
        token_weights("mean", [1], total_tokens=1, total_sequences=1)
    with pytest.raises(ValueError, match="constant"):
        token_weights("constant", [1], total_tokens=1, total_sequences=1)
    with pytest.raises(ValueError, match="sum them up"):
        token_weights("token_mean", [3], total_tokens=2, total_sequences=1)
