"""Labels: which classes, how often, how mixed."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from synthesis.labels import BalancedLabels, LabelSource, RandomLabels, SuperposedLabels
from synthesis.seeding import seeded


@pytest.mark.parametrize("source", [RandomLabels(), BalancedLabels(), SuperposedLabels(0.5, 3)])
def test_labels_are_probabilities_and_repeatable(source: LabelSource) -> None:
    labels = source.draw(50, 7, seeded(0))
    assert labels.shape == (50, 7)
    torch.testing.assert_close(labels.sum(1), torch.ones(50))
    assert labels.min() >= 0
    assert torch.equal(source.draw(50, 7, seeded(0)), labels)
    assert not torch.equal(source.draw(50, 7, seeded(1)), labels)


def test_random_labels_are_uniform() -> None:
    counts = RandomLabels().draw(5000, 10, seeded(0)).sum(0)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("count", "classes"), [(30, 10), (25, 10), (3, 10)])
def test_balanced_labels_differ_by_at_most_one(count: int, classes: int) -> None:
    counts = BalancedLabels().draw(count, classes, seeded(0)).sum(0)
    assert counts.max() - counts.min() <= 1
    assert counts.sum() == count


def test_superposed_labels_mix_with_softmax_weights() -> None:
    labels = SuperposedLabels(0.4, 2).draw(20000, 1000, seeded(0))
    mixed = (labels > 0).sum(1) > 1
    assert abs(mixed.float().mean() - 0.4) < 0.015
    # softmax of two standard normals: the larger weight is sigmoid(|N(0, 2)|)
    larger = labels[mixed].amax(1)
    expected = torch.sigmoid(torch.randn(200000, generator=seeded(1)).abs() * 2**0.5).mean()
    assert abs(larger.mean() - expected) < 0.005
    assert torch.equal((SuperposedLabels(0.0, 2).draw(9, 5, seeded(0)) > 0).sum(1), torch.ones(9))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels\.probability"):
        SuperposedLabels(1.5, 2)
    with pytest.raises(ValueError, match=r"labels\.mixed"):
        SuperposedLabels(0.5, 1)
