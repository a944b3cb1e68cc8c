"""Isotonic regression against scipy's, and against its defining property."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.groups import Choice
from allocation.monotone import not_rising, tidy


def pool_adjacent(values: list[float]) -> list[float]:
    """The closest falling sequence: neighbours that rise are averaged until none does."""
    blocks = [[v] for v in values]
    i = 0
    while i < len(blocks) - 1:
        if np.mean(blocks[i]) < np.mean(blocks[i + 1]) - 1e-15:
            blocks[i : i + 2] = [blocks[i] + blocks[i + 1]]
            i = max(i - 1, 0)
        else:
            i += 1
    return [float(np.mean(block)) for block in blocks for _ in block]


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_on_a_chain_it_pools_adjacent_violators(values: list[float]) -> None:
    found = not_rising(np.array(values), [[bits] for bits in range(len(values))])
    np.testing.assert_allclose(found, pool_adjacent(values), atol=1e-8)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_on_pairs_of_widths_nothing_feasible_is_closer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    widths = [(w, a) for w in (2, 4, 8) for a in (2, 4, 8) if rng.uniform() < 0.8] or [(2, 2)]
    values = rng.normal(size=len(widths))
    found = not_rising(values, widths)
    order = [(i, j) for i, a in enumerate(widths) for j, b in enumerate(widths) if a[0] <= b[0] and a[1] <= b[1]]
    assert all(found[i] >= found[j] - 1e-9 for i, j in order)
    np.testing.assert_allclose(not_rising(found, widths), found, atol=1e-8)
    other = np.array([-0.3 * w - 0.1 * a for w, a in widths]) * rng.uniform(0, 1) + rng.normal()
    towards = (found - values) @ (other - found)  # the angle at a projection onto a convex set is not acute
    assert towards >= -1e-8


def test_baseline_is_subtracted_and_nothing_is_negative() -> None:
    choices = [Choice((w, 4), ((w, 4),), (4,)) for w in (2, 4, 8)]
    harm = torch.tensor([[3.0, 5.0], [1.0, 1.5], [0.5, 0.5]])
    found = tidy(harm, torch.tensor([1.0, 1.0]), choices)
    np.testing.assert_allclose(found.values, [3.0, 0.25, 0.0])


def test_deviation_is_that_of_the_mean() -> None:
    samples = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    found = tidy(samples, torch.zeros(400), [Choice((4, 4), ((4, 4),), ())])
    assert found.deviation[0] == pytest.approx(float(samples.std()) / 20, rel=0.15)
    assert tidy(samples[:, :1], torch.zeros(1), [Choice((4, 4), ((4, 4),), ())]).deviation[0] == 0.0
