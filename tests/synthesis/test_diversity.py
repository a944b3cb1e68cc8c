"""Diversity of a set against loops over layers and pairs of samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from torch import Tensor

from synthesis.diversity import Diversity
from synthesis.moments import Moments

SIZES = [3, 5]
N, EPS = 6, 1e-6


def draw(seed: int, *shape: int) -> Moments:
    rng = torch.Generator().manual_seed(seed)
    return Moments(torch.randn(*shape, generator=rng), torch.rand(*shape, generator=rng) + 0.1)


def mean_similarity(vectors: Tensor) -> float:
    pairs = itertools.combinations(vectors.double().numpy(), 2)
    return float(np.mean([1 - cosine(a, b) for a, b in pairs]))


def test_against_a_loop_and_in_any_batches() -> None:
    target, seen = draw(0, 8), draw(1, N, 8)
    features = torch.randn(N, 4, generator=torch.Generator().manual_seed(2))
    diversity = Diversity(target, SIZES)
    for part in (slice(0, 1), slice(1, 4), slice(4, N)):
        diversity.update(Moments(seen.mean[part], seen.var[part]), features[part])
    sigma = (target.var + EPS).sqrt()
    gaps = ((seen.mean - target.mean) / sigma, (((seen.var + EPS).sqrt() - sigma) / sigma))
    for index, columns in enumerate((slice(0, 3), slice(3, 8))):
        row = diversity.compute()[index]
        mean, std = (gap[:, columns] for gap in gaps)
        assert row.mean_spread == pytest.approx(mean.square().mean().sqrt().item(), rel=1e-5)
        assert row.std_spread == pytest.approx(std.square().mean().sqrt().item(), rel=1e-5)
        assert row.similarity == pytest.approx(mean_similarity(torch.cat([mean, std], 1)), rel=1e-4, abs=1e-6)
    assert diversity.feature_similarity() == pytest.approx(mean_similarity(features), rel=1e-4, abs=1e-6)


def test_copies_of_one_sample_are_wholly_alike() -> None:
    target, one = draw(0, 8), draw(1, 1, 8)
    diversity = Diversity(target, SIZES)
    diversity.update(Moments(one.mean.expand(4, 8), one.var.expand(4, 8)), torch.ones(4, 2))
    assert [row.similarity for row in diversity.compute()] == pytest.approx([1, 1])
    assert diversity.feature_similarity() == pytest.approx(1)


def test_one_sample_has_nobody_to_resemble() -> None:
    diversity = Diversity(draw(0, 8), SIZES)
    diversity.update(draw(1, 1, 8))
    assert math.isnan(diversity.compute()[0].similarity)
    assert math.isnan(diversity.feature_similarity())
