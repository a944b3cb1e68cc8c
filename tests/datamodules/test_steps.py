"""The loader that only counts steps."""

from __future__ import annotations

import pytest

from datamodules.steps import Steps


def test_steps_count_and_resume() -> None:
    steps = Steps(4)
    assert list(steps) == list(steps) == [0, 1, 2, 3]
    taken = iter(steps)
    assert [next(taken), next(taken)] == [0, 1]
    other = Steps(4)
    other.load_state_dict(steps.state_dict())
    assert list(other) == [2, 3]
    assert list(other) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="count"):
        Steps(0)
