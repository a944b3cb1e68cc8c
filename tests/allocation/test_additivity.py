"""Random assignments cover few to many bits; ranks are compared, not sizes."""

from __future__ import annotations

import pytest

from allocation.additivity import draw_assignments, rank_correlation


def test_assignments_are_valid_spread_and_repeatable() -> None:
    sizes = [1, 7, 3, 7]
    found = draw_assignments(sizes, 20, seed=0)
    assert all(0 <= i < size for chosen in found for i, size in zip(chosen, sizes, strict=True))
    means = [sum(chosen) for chosen in found]
    assert sum(means[:5]) < sum(means[-5:]) / 2
    assert found == draw_assignments(sizes, 20, seed=0) != draw_assignments(sizes, 20, seed=1)


def test_correlation_is_of_ranks() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 1], [3, 2, 1]) == 0.0  # and no warning
    # one exchange of neighbours among n: 1 - 6 * 2 / (n (n^2 - 1))
    assert rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 12 / 60)
