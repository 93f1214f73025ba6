"""The batch algebra against numbers worked out by hand."""

from __future__ import annotations

import pytest

from llmrl.cli.plan import solve
from llmrl.config.grpo import GRPOConfig
from llmrl.config.sft import SFTConfig

BASE = {"model_name_or_path": "m", "output_dir": "o", "shuffle": False}


def test_sft():
    plan = solve(SFTConfig(**BASE, batch_size=4, tokens_per_microbatch=100, num_train_epochs=2), [50] * 10)
    assert (plan.steps, plan.updates, plan.tokens_per_step, plan.sequences_per_step) == (5, 5, 200, 4)
    assert (plan.max_microbatches, plan.largest_microbatch, plan.fill) == (2, 100, 1.0)


def test_sft_updates_and_processes():
    config = SFTConfig(**BASE, batch_size=8, updates_per_step=2, tokens_per_microbatch=100, max_steps=3)
    one, two = solve(config, [50] * 10), solve(config, [50] * 10, processes=2)
    assert (one.updates, one.max_microbatches, two.max_microbatches) == (6, 4, 2)


def test_a_row_over_the_budget_is_a_microbatch_of_its_own():
    plan = solve(SFTConfig(**BASE, batch_size=2, tokens_per_microbatch=100), [250, 50])
    assert (plan.max_microbatches, plan.largest_microbatch) == (2, 250)


@pytest.mark.parametrize(("slots", "rows"), [(10_000, 12), (200, 4), (10, 1)])
def test_grpo(slots, rows):
    config = GRPOConfig(
        **BASE, batch_size=3, num_generations=4, max_completion_length=40, tokens_per_microbatch=100, num_iterations=2,
        max_steps=5, rollout={"max_batch_tokens": slots},
    )  # fmt: skip
    plan = solve(config, [10, 10, 10, 10])
    assert (plan.steps, plan.updates, plan.sequences_per_step, plan.tokens_per_step) == (5, 10, 12, 600)
    assert (plan.max_microbatches, plan.largest_microbatch) == (6, 100)
    assert (plan.decode_rows, plan.cache_tokens) == (rows, rows * 50)


def test_grpo_on_two_processes_follows_the_groups():
    config = GRPOConfig(
        **BASE, batch_size=3, num_generations=2, max_completion_length=90, tokens_per_microbatch=100, max_steps=1
    )
    plan = solve(config, [10] * 3, processes=2)
    assert (plan.max_microbatches, plan.decode_rows) == (4, 4)  # the first process samples groups 0 and 2
