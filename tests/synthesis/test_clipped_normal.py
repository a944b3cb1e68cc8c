"""Moments behind activation functions against numerical integration and a large sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import Tensor

from synthesis import clipped_normal as cn
from synthesis.moments import Moments

MEANS, DEVIATIONS = (-4.0, -0.7, 0.0, 0.3, 5.0), (0.05, 0.6, 1.0, 3.0)
PRIOR = Moments(
    *(t.flatten() for t in torch.meshgrid(torch.tensor(MEANS), torch.tensor(DEVIATIONS) ** 2, indexing="ij"))
)
FUNCTIONS: list[tuple[Callable[[Moments], Moments], Callable[[Tensor], Tensor], tuple[float, ...]]] = [
    (cn.relu, F.relu, (0.0,)),
    (cn.relu6, F.relu6, (0.0, 6.0)),
    (lambda p: cn.clamp(p, -1.0, 2.0), lambda x: x.clamp(-1, 2), (-1.0, 2.0)),
    (lambda p: cn.leaky_relu(p, 0.1), lambda x: F.leaky_relu(x, 0.1), (0.0,)),
    (cn.hardsigmoid, F.hardsigmoid, (-3.0, 3.0)),
    (cn.hardswish, F.hardswish, (-3.0, 3.0)),
    (cn.silu, F.silu, ()),
    (cn.gelu, F.gelu, ()),
    (cn.sigmoid, torch.sigmoid, ()),
    (cn.tanh, torch.tanh, ()),
]


def expectation(function: Callable[[float], float], mean: float, std: float, kinks: tuple[float, ...]) -> float:
    edges = [mean - 12 * std, *(k for k in kinks if abs(k - mean) < 12 * std), mean, mean + 12 * std]
    edges = sorted(set(edges))
    density = stats.norm(mean, std).pdf
    return sum(integrate.quad(lambda x: function(x) * density(x), a, b)[0] for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize(("ours", "function", "kinks"), FUNCTIONS)
def test_against_numerical_integration(ours: Callable, function: Callable, kinks: tuple[float, ...]) -> None:
    found = ours(PRIOR)

    def value(x: float) -> float:
        return float(function(torch.tensor(x, dtype=torch.float64)))

    for i, (mean, var) in enumerate(zip(PRIOR.mean.tolist(), PRIOR.var.tolist(), strict=True)):
        first = expectation(value, mean, var**0.5, kinks)
        second = expectation(lambda x: value(x) ** 2, mean, var**0.5, kinks)
        assert float(found.mean[i]) == pytest.approx(first, rel=1e-4, abs=1e-5)
        assert float(found.var[i]) == pytest.approx(second - first**2, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("ours", "function", "kinks"), FUNCTIONS)
def test_without_variance_it_is_the_function(ours: Callable, function: Callable, kinks: tuple[float, ...]) -> None:
    points = torch.tensor([-7.0, -1.0, 0.0, 0.5, 8.0])
    found = ours(Moments(points, torch.zeros(5)))
    torch.testing.assert_close(found.mean, function(points), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.var, torch.zeros(5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_largest_of_some(count: int) -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(0.3, 2.0, (400_000, count)).max(1)
    found = cn.maximum(Moments(torch.tensor([0.3]), torch.tensor([4.0])), count)
    assert float(found.mean) == pytest.approx(sample.mean(), abs=0.02)
    assert float(found.var) == pytest.approx(sample.var(), rel=0.02)
