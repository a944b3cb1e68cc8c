"""AdaQuant: gradients through rounding, the rates of its parameters, and a layer that it improves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantizers.adaquant import AdaQuant
from quantizers.nearest import Nearest
from quantizers.ranges import LpSearch, MinMax


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(quantizer: AdaQuant, loss: Callable[[AdaQuant], Tensor], steps: int) -> None:
    optimizer = torch.optim.Adam([{"params": g["params"], "lr": g["lr"]} for g in quantizer.parameter_groups()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(quantizer).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("learn_range", [False, True])
def test_it_starts_at_nearest(symmetric: bool, learn_range: bool) -> None:
    weight = draw(6, 4, 3, 3)
    quantizer = AdaQuant(weight, 3, symmetric=symmetric, range=LpSearch(), learn_range=learn_range)
    assert torch.equal(quantizer(weight), Nearest(weight, 3, symmetric=symmetric, range=LpSearch())(weight))


def test_gradients_pass_rounding_and_stop_at_the_clip() -> None:
    weight = draw(6, 40)
    quantizer = AdaQuant(weight, 3, range=LpSearch())
    upstream = draw(6, 40, seed=1)
    quantizer(weight).backward(upstream)
    steps = weight / quantizer.scale.detach()
    level = steps.round() + quantizer.zero_point.detach()
    below, above = level < 0, level > 7
    assert below.any()
    assert above.any()
    inside = ~(below | above)
    torch.testing.assert_close(quantizer.weight.grad, upstream * inside)
    z = quantizer.zero_point.detach()
    slope = torch.where(inside, steps.round() - steps, torch.where(below, -z, 7 - z))
    torch.testing.assert_close(quantizer.scale.grad, (upstream * slope).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    expected = -(upstream * ~inside).sum(1, keepdim=True) * quantizer.scale.detach()
    torch.testing.assert_close(quantizer.zero_point.grad, expected)


def test_rates_move_the_ends_of_the_range_alike() -> None:
    quantizer = AdaQuant(draw(6, 40), 4, range=MinMax(), weight_lr=0.01, range_lr=0.1)
    scale = quantizer.scale.mean().item()
    weight, step, zero_point = quantizer.parameter_groups()
    assert [g["kind"] for g in (weight, step, zero_point)] == ["weight", "scale", "scale"]
    assert weight["lr"] == pytest.approx(0.01 * scale)
    assert step["lr"] * 15 == pytest.approx(0.1 * 15 * scale)  # the range is 15 steps wide
    assert zero_point["lr"] * scale == pytest.approx(0.1 * 15 * scale)
    quantizer = AdaQuant(draw(6, 40), 4, range=MinMax(), weight_lr=1e-5, range_lr=1e-3, absolute=True)
    weight, step, zero_point = quantizer.parameter_groups()
    assert weight["lr"] == 1e-5
    assert step["lr"] * 15 == pytest.approx(1e-3)
    assert zero_point["lr"] * scale == pytest.approx(1e-3)


def test_what_is_learned_follows_the_arguments() -> None:
    weight = draw(6, 40)
    assert len(AdaQuant(weight, 4, range=MinMax(), symmetric=True).parameter_groups()) == 2
    fixed = AdaQuant(weight, 4, range=MinMax(), learn_range=False)
    assert [name for name, _ in fixed.named_parameters()] == ["weight"]
    assert len(fixed.parameter_groups()) == 1


@pytest.mark.parametrize("bits", [2, 4])
def test_learned_on_a_layer_it_beats_nearest_at_any_size_of_the_weights(bits: int) -> None:
    inputs = (draw(256, 32, seed=1) @ draw(32, 32, seed=2) / 6).relu()
    learned = []
    for size in (1.0, 2.0**-10):
        weight = draw(512, 32) * size  # many channels, since what one of them learns hangs on a processor's last bits
        target = inputs @ weight.T
        quantizer = AdaQuant(weight, bits, range=MinMax())
        nearest = (inputs @ quantizer(weight).T - target).square().mean().item()
        train(quantizer, lambda q, w=weight, t=target, s=size: ((inputs @ q(w).T - t) / s).square().mean(), 300)
        quantizer.harden()
        learned.append((inputs @ quantizer(weight).T - target).square().mean().item() / nearest)
    assert learned[0] < 0.8
    assert learned[1] == pytest.approx(learned[0], rel=0.1)


def test_hardening_leaves_an_integral_zero_point_and_a_weight_on_its_grid() -> None:
    weight = draw(6, 40)
    quantizer = AdaQuant(weight, 3, range=LpSearch())
    with torch.no_grad():
        quantizer.zero_point.add_(0.7)
        quantizer.scale.mul_(1.1)
    before = quantizer(weight).detach()
    quantizer.harden()
    assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())
    assert torch.equal(quantizer(weight), before)
    assert torch.equal(quantizer.weight, before)
