"""ACIQ's clipping against its own optimality condition, without its published table."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import erf, lambertw

from synthesis.analytic_ranges import OptimalClipping, Shape
from synthesis.moments import Moments

Distribution = Literal["gauss", "laplace"]


def laplace(bits: int) -> float:
    """alpha / b: the zero of d/da [2 b^2 exp(-a / b) + a^2 / (3 4^M)], hence a / b exp(a / b) = 3 4^M."""
    return float(lambertw(3 * 4**bits).real)


def gauss(bits: int) -> float:
    """alpha / sigma of least error: (a^2 + 1)(1 - erf(a / sqrt 2)) - a exp(-a^2 / 2) sqrt(2 / pi) + a^2 / (3 4^M)."""

    def error(a: float) -> float:
        clipped = (a * a + 1) * (1 - erf(a / math.sqrt(2))) - a * math.exp(-a * a / 2) * math.sqrt(2 / math.pi)
        return float(clipped) + a * a / (3 * 4**bits)

    found: Any = minimize_scalar(error, bounds=(0.5, 8), method="bounded", options={"xatol": 1e-6})
    return float(found.x)


def half_width(distribution: Distribution, bits: int, low: float = -math.inf) -> float:
    """alpha of a tensor of deviation 3 and mean 5, in units of its scale."""
    shape = Shape(Moments(torch.full((4,), 5.0), torch.full((4,), 9.0)), low, math.inf)
    bottom, top = OptimalClipping(distribution).bounds(shape, bits)
    assert bottom + top == pytest.approx(10)
    return (top - bottom) / 2 / (3 if distribution == "gauss" else 3 / math.sqrt(2))


def test_the_closed_form_gives_the_number_of_the_paper() -> None:
    assert laplace(4) == pytest.approx(5.03, abs=0.005)


@pytest.mark.parametrize("bits", range(2, 9))
def test_laplace(bits: int) -> None:
    assert half_width("laplace", bits) == pytest.approx(laplace(bits), abs=0.01)


@pytest.mark.parametrize("bits", range(1, 9))
def test_gauss(bits: int) -> None:
    assert half_width("gauss", bits) == pytest.approx(gauss(bits), abs=0.01)


@pytest.mark.parametrize("bits", range(2, 8))
def test_half_of_the_range_suffices_behind_a_relu(bits: int) -> None:
    assert half_width("laplace", bits, low=0.0) == pytest.approx(laplace(bits + 1), abs=0.01)
    assert half_width("gauss", bits, low=0.0) == pytest.approx(gauss(bits + 1), abs=0.01)


def test_nine_bits_go_on_as_eight_did() -> None:
    assert half_width("laplace", 8, low=0.0) == pytest.approx(laplace(9), abs=0.05)
    assert half_width("gauss", 8, low=0.0) == pytest.approx(gauss(9), abs=0.05)


def test_channels_are_pooled_into_one_tensor() -> None:
    means, variances = torch.tensor([0.0, 4.0, -1.0]), torch.tensor([1.0, 2.0, 0.5])
    pooled = float(variances.mean() + means.var(correction=0))
    low, high = OptimalClipping("gauss").bounds(Shape(Moments(means, variances), -math.inf, math.inf), 4)
    assert (low + high) / 2 == pytest.approx(1.0)
    assert (high - low) / 2 == pytest.approx(gauss(4) * math.sqrt(pooled), rel=0.005)
