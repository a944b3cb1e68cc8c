"""Stages keep their proportions whatever the number of steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthesis.stages import Stages


def test_published_numbers_are_the_lengths_until_told_otherwise() -> None:
    stages = Stages([2000, 1000])
    assert (stages.starts, stages.ends) == ([0, 2000], [2000, 3000])
    assert [stages.index(step) for step in (0, 1999, 2000, 2999, 3000)] == [0, 0, 1, 1, 2]
    stages.plan(3000)
    assert stages.ends == [2000, 3000]
    stages.plan(200)
    assert stages.ends == [133, 200]
    assert stages.scaled(300) == 20


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.integers(1, 10000))
def test_stages_fill_the_steps_in_proportion_and_the_last_is_never_left_out(shares: list[int], steps: int) -> None:
    stages = Stages(shares)
    stages.plan(steps)
    found = [stages.index(step) for step in range(steps)]
    assert found == sorted(found)
    assert found[-1] == len(shares) - 1
    for stage, share in enumerate(shares):
        assert abs(found.count(stage) - steps * share / sum(shares)) <= 1


@pytest.mark.parametrize("shares", [[], [3, 0]])
def test_lengths_must_be_positive(shares: list[int]) -> None:
    with pytest.raises(ValueError, match="shares: expected a positive number of steps for each stage"):
        Stages(shares)
