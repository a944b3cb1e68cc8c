"""Mean and variance of a normal variable after an activation function or a maximum, channel by channel.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (DFQ), ICCV 2019, arXiv
1906.04721, section 4.2.1 and appendix, give E[ReLU(x)] in closed form. Deviates: variances too,
any clamp, and smooth functions by quadrature. Computed in float64; the result has the type of the argument.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from synthesis.moments import Moments

REACH = 9.0  # standard deviations: the tails beyond hold 2e-19 of the mass
NODES = 64  # per piece
TINY = 1e-150  # in place of a deviation of zero, so that every ratio is finite
FAR = 38.0  # standard deviations beyond which float64 knows no tail


def clamp(prior: Moments, low: float = -math.inf, high: float = math.inf) -> Moments:
    """Return the moments of clamp(x, low, high) for x ~ N(mean, var), in closed form.

    Args:
        prior: of any shape; variances may be zero.
        low, high: the bounds; infinite where there is none.
    """
    mean, var, std = _exact(prior)
    below, above = ((bound - mean) / std for bound in (low, high))
    below, above = below.clamp(-FAR, FAR), above.clamp(-FAR, FAR)
    # first and second moment about the mean of x, not about zero, where they would cancel
    at_low = low - mean if math.isfinite(low) else torch.zeros_like(mean)
    at_high = high - mean if math.isfinite(high) else torch.zeros_like(mean)
    mass_low, mass_high = torch.special.ndtr(below), torch.special.ndtr(-above)
    first = at_low * mass_low + at_high * mass_high + std * (_density(below) - _density(above))
    inside = 1 - mass_low - mass_high + below * _density(below) - above * _density(above)
    second = at_low.square() * mass_low + at_high.square() * mass_high + var * inside
    return _like(prior, (mean + first).clamp(low, high), second - first.square())


def relu(prior: Moments) -> Moments:
    """Return the moments of max(x, 0) for x ~ N(mean, var), in closed form."""
    return clamp(prior, low=0.0)


def relu6(prior: Moments) -> Moments:
    """Return the moments of min(max(x, 0), 6) for x ~ N(mean, var), in closed form."""
    return clamp(prior, 0.0, 6.0)


def leaky_relu(prior: Moments, slope: float | Tensor = 0.01) -> Moments:
    """Return the moments of x where positive and slope * x elsewhere, in closed form.

    Args:
        prior: of any shape.
        slope: a number or a tensor that broadcasts (PReLU).
    """
    slope = slope.to(prior.mean.device, torch.float64) if isinstance(slope, Tensor) else slope
    mean, var, _ = _exact(prior)
    up, down = relu(Moments(mean, var)), relu(Moments(-mean, var))
    # one of the two halves is zero, so the mean of their product is
    return _like(prior, up.mean - slope * down.mean, up.var + slope**2 * down.var + 2 * slope * up.mean * down.mean)


def hardsigmoid(prior: Moments) -> Moments:
    """Return the moments of clamp(x / 6 + 1/2, 0, 1) for x ~ N(mean, var), in closed form."""
    mean, var, _ = _exact(prior)
    return _like(prior, *clamp(Moments(mean / 6 + 0.5, var / 36), 0.0, 1.0))


def hardswish(prior: Moments) -> Moments:
    """Return the moments of x * clamp(x + 3, 0, 6) / 6 for x ~ N(mean, var), by quadrature."""
    return transform(prior, F.hardswish, kinks=(-3.0, 3.0))


def silu(prior: Moments) -> Moments:
    """Return the moments of x * sigmoid(x) for x ~ N(mean, var), by quadrature."""
    return transform(prior, F.silu)


def gelu(prior: Moments, approximate: str = "none") -> Moments:
    """Return the moments of GELU for x ~ N(mean, var), by quadrature; `approximate` as in `F.gelu`."""
    return transform(prior, lambda x: F.gelu(x, approximate=approximate))


def sigmoid(prior: Moments) -> Moments:
    """Return the moments of the logistic function of x ~ N(mean, var), by quadrature."""
    return transform(prior, torch.sigmoid)


def tanh(prior: Moments) -> Moments:
    """Return the moments of tanh(x) for x ~ N(mean, var), by quadrature."""
    return transform(prior, torch.tanh)


def transform(prior: Moments, function: Callable[[Tensor], Tensor], kinks: Sequence[float] = (0.0,)) -> Moments:
    """Return the moments of function(x) for x ~ N(mean, var), by Gauss-Legendre quadrature between the kinks.

    Gauss-Hermite nodes take no account of where the function bends: with 64 of them the mean of a hardswish is off by
    1.6 per cent at N(-2, 5^2), and the mean of a tanh by a half at N(1, 10^2).

    Args:
        prior: of any shape.
        function: elementwise.
        kinks: in ascending order, where the function is not smooth, or turns quickly against a wide normal.
    """
    mean, _, std = _exact(prior)
    edges = [torch.full_like(mean, -REACH), *(((k - mean) / std).clamp(-REACH, REACH) for k in kinks)]
    edges.append(torch.full_like(mean, REACH))
    nodes, weights = (torch.from_numpy(a).to(mean.device) for a in np.polynomial.legendre.leggauss(NODES))
    nodes, weights = (a.view(-1, *(1,) * mean.dim()) for a in (nodes, weights))
    halves = [(right - left) / 2 for left, right in itertools.pairwise(edges)]
    z = torch.cat([left + half * (1 + nodes) for left, half in zip(edges, halves, strict=False)])
    mass = torch.cat([half * weights for half in halves]) * _density(z)
    mass = mass / mass.sum(0)
    value = function(mean + std * z)
    expected = (mass * value).sum(0)
    return _like(prior, expected, (mass * (value - expected).square()).sum(0))


def maximum(prior: Moments, count: int) -> Moments:
    """Return the moments of the largest of `count` independent copies of x ~ N(mean, var).

    Neighbours in a feature map are not independent, so that max pooling in truth lifts the mean less.

    Args:
        prior: of any shape.
        count: how many, the area of a pooling window.

    Raises:
        ValueError: if `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}; give the area of the pooling window")
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(4 * NODES))
    z = REACH * nodes
    # density of the largest of k standard normals: k phi(z) Phi(z)^(k - 1)
    mass = REACH * weights * count * _density(z) * torch.special.ndtr(z) ** (count - 1)
    lift = float((mass * z).sum() / mass.sum())
    spread = float((mass * (z - lift).square()).sum() / mass.sum())
    mean, var = prior.mean.double(), prior.var.double()
    return _like(prior, mean + lift * var.sqrt(), spread * var)


def _exact(prior: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and a deviation that is never zero, in float64."""
    mean, var = torch.broadcast_tensors(prior.mean.double(), prior.var.double())
    return mean, var, var.sqrt().clamp_min(TINY)


def _density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def _like(prior: Moments, mean: Tensor, var: Tensor) -> Moments:
    return Moments(mean.to(prior.mean.dtype), var.clamp_min(0).to(prior.var.dtype))
