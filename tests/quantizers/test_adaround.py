"""AdaRound: the regularizer in closed form, the soft start, hardening, and a layer that it improves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantizers.adaround import AdaRound
from quantizers.nearest import Nearest
from quantizers.ranges import LpSearch, MinMax


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def h(V: Tensor) -> Tensor:
    """Equation 23 of the paper, in float64."""
    return torch.clamp(1.2 / (1 + torch.exp(-V.detach().double())) - 0.1, 0, 1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_it_starts_at_the_clipped_float_weight(bits: int, symmetric: bool) -> None:
    weight = draw(6, 4, 3, 3)
    quantizer = AdaRound(weight, bits, symmetric=symmetric, range=LpSearch())
    grid, scale, zero_point = quantizer.grid, quantizer.scale, quantizer.zero_point
    clipped = torch.minimum(torch.maximum(weight, (grid.low - zero_point) * scale), (grid.high - zero_point) * scale)
    torch.testing.assert_close(quantizer(weight), clipped, rtol=1e-5, atol=1e-5)
    assert bits > 4 or not torch.equal(clipped, weight)


@pytest.mark.parametrize("symmetric", [False, True])
def test_hardened_at_once_it_is_nearest(symmetric: bool) -> None:
    weight = draw(6, 50)
    quantizer = AdaRound(weight, 3, symmetric=symmetric, range=LpSearch())
    assert quantizer.soft_fraction() > 0.8
    quantizer.harden()
    assert torch.equal(quantizer(weight), Nearest(weight, 3, symmetric=symmetric, range=LpSearch())(weight))
    assert quantizer.soft_fraction() == 0


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("progress", [0.2, 0.35, 0.6, 0.999, 1.0])
def test_the_regularizer_is_the_papers(progress: float, shape) -> None:
    quantizer = AdaRound(draw(6, 50), 4, range=MinMax(), beta_schedule=shape)
    t = (progress - 0.2) / 0.8
    left = 1 - t if shape == "linear" else 0.5 * (1 + math.cos(t * math.pi))
    beta = 2 + 18 * left
    expected = (1 - (2 * h(quantizer.V) - 1).abs() ** beta).mean()
    assert quantizer.regularizer(progress).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_regularizer_waits_for_the_warmup_and_is_zero_once_hard() -> None:
    quantizer = AdaRound(draw(6, 50), 4, range=MinMax(), warmup=0.3)
    assert quantizer.regularizer(0.0).item() == quantizer.regularizer(0.299).item() == 0
    assert quantizer.regularizer(0.3).item() > 0
    quantizer.harden()
    assert quantizer.regularizer(1.0).item() == 0


def test_weights_outside_the_range_are_decided_and_pay_nothing() -> None:
    weight = draw(4, 200)
    quantizer = AdaRound(weight, 2, range=LpSearch())
    position = weight / quantizer.scale + quantizer.zero_point
    outside = (position < 0) | (position > 3)
    assert outside.sum() > 10
    (quantizer(weight).square().sum() + quantizer.regularizer(0.5)).backward()
    assert bool((quantizer.V.grad[outside] == 0).all())
    assert bool((quantizer.V.grad[~outside] != 0).float().mean() > 0.9)
    decided = h(quantizer.V)[outside]
    assert bool(((decided == 0) | (decided == 1)).all())
    ends = torch.where(position > 3, 3 - quantizer.zero_point, 0 - quantizer.zero_point) * quantizer.scale
    assert torch.equal(quantizer(weight)[outside], ends[outside])


def test_the_gradient_is_the_papers() -> None:
    weight = draw(4, 20)
    quantizer = AdaRound(weight, 4, range=MinMax())
    upstream = draw(4, 20, seed=1)
    quantizer(weight).backward(upstream)
    sigmoid = torch.sigmoid(quantizer.V.detach())
    undecided = (h(quantizer.V) > 1e-3) & (h(quantizer.V) < 1 - 1e-3)
    expected = upstream * quantizer.scale * 1.2 * sigmoid * (1 - sigmoid)
    torch.testing.assert_close(quantizer.V.grad[undecided], expected[undecided])


def test_learned_on_a_layer_it_beats_nearest() -> None:
    weight = draw(8, 16)
    inputs = draw(256, 16, seed=1) @ draw(16, 16, seed=2)
    quantizer = AdaRound(weight, 3, range=LpSearch(), lr=2e-2)
    (group,) = quantizer.parameter_groups()
    optimizer = torch.optim.Adam(group["params"], lr=group["lr"])
    target = inputs @ weight.T

    def error() -> Tensor:
        return (inputs @ quantizer(weight).T - target).square().mean() / target.square().mean()

    for step in range(600):
        optimizer.zero_grad()
        (error() + quantizer.regularizer(step / 600)).backward()
        optimizer.step()
    assert quantizer.soft_fraction() < 0.01
    soft = error().item()
    quantizer.harden()
    assert error().item() == pytest.approx(soft, rel=0.05)
    learned = error().item()
    quantizer.initialize(weight)
    quantizer.harden()  # rounding to nearest
    assert learned < 0.6 * error().item()


def test_initialize_keeps_the_identity_of_parameters() -> None:
    quantizer = AdaRound(draw(6, 50), 4, range=MinMax())
    V, base, scale = quantizer.V, quantizer.base, quantizer.scale
    quantizer.initialize(draw(6, 50, seed=3))
    assert quantizer.V is V
    assert quantizer.base is base
    assert quantizer.scale is scale
    (group,) = quantizer.parameter_groups()
    assert group["params"][0] is V
    assert (group["lr"], group["anneal"], group["kind"]) == (1e-3, "constant", "rounding")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": -0.1}, "warmup"),
        ({"beta_end": 0.5}, "beta_start, beta_end"),
        ({"beta_schedule": "step"}, "beta_schedule"),
    ],
)
def test_impossible_schedules_are_refused(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        AdaRound(draw(2, 2), 4, range=MinMax(), **options)
