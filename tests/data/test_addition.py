"""The quickstart's task: right where it says so, forgetful where it says so, no sum in two files."""

from __future__ import annotations

import json

import pytest

from llmrl.data.addition import FORGETFUL, PROBLEMS, solution, write_files


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(row):
    a, b = row["prompt"].removesuffix("=?\n").split("+")
    return int(a), int(b)


def test_the_carry_is_written_out_or_forgotten():
    assert solution(347, 586, carry=True) == "7+6=13\n4+8=12+1=13\n3+5=8+1=9\n933"
    assert solution(347, 586, carry=False) == "7+6=13\n4+8=12\n3+5=8\n823"
    assert solution(999, 999, carry=True).endswith("\n1998")
    assert solution(123, 456, carry=True) == solution(123, 456, carry=False)


@pytest.mark.parametrize("a, b", [(100, 100), (555, 445), (909, 191), (678, 987)])
def test_the_sum_with_carry_is_the_sum(a, b):
    assert solution(a, b, carry=True).endswith(f"\n{a + b}")


def test_files_are_disjoint_reproducible_and_forgetful_as_said(tmp_path):
    paths = write_files(tmp_path / "a", seed=3)
    again = write_files(tmp_path / "b", seed=3)
    other = write_files(tmp_path / "c", seed=4)
    sums = [frozenset(numbers(row)) for path in paths.values() for row in read(path)]
    assert len(sums) == len(set(sums)) == sum(PROBLEMS.values())
    for name in PROBLEMS:
        assert paths[name].read_bytes() == again[name].read_bytes() != other[name].read_bytes()
    for name in ("prompts", "held_out"):
        assert all(int(row["answer"]) == sum(numbers(row)) for row in read(paths[name]))
    needing = [
        r
        for r in read(paths["demonstrations"])
        if solution(*numbers(r), carry=True) != solution(*numbers(r), carry=False)
    ]
    forgot = [row["completion"] == solution(*numbers(row), carry=False) for row in needing]
    assert sum(forgot) / len(forgot) == pytest.approx(FORGETFUL, abs=0.02)
    assert 1 - len(needing) / PROBLEMS["demonstrations"] == pytest.approx(0.3, abs=0.02)  # sums that need no carry
