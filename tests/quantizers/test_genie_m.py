"""Genie-M: AdaRound's roundings with a step that moves without moving the integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantizers.adaround import AdaRound
from quantizers.genie_m import GenieM
from quantizers.ranges import LpSearch, MinMax


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_with_the_first_step_it_is_adaround() -> None:
    weight = draw(6, 4, 3, 3)
    genie, adaround = GenieM(weight, 3, range=LpSearch()), AdaRound(weight, 3, range=LpSearch())
    assert torch.equal(genie(weight), adaround(weight))
    assert torch.equal(genie.regularizer(0.7), adaround.regularizer(0.7))
    genie.harden()
    adaround.harden()
    assert torch.equal(genie(weight), adaround(weight))


def test_moving_the_step_scales_the_weight_and_keeps_the_integers() -> None:
    weight = draw(6, 40)
    quantizer = GenieM(weight, 3, range=LpSearch())
    before, integers = quantizer(weight).detach(), quantizer.integers(weight)[0]
    with torch.no_grad():
        quantizer.scale.mul_(1.3)
    torch.testing.assert_close(quantizer(weight).detach(), before * 1.3)
    assert torch.equal(quantizer.integers(weight)[0], integers)


def test_the_gradient_of_the_step_is_the_number_of_steps() -> None:
    weight = draw(6, 40)
    quantizer = GenieM(weight, 3, range=LpSearch())
    upstream = draw(6, 40, seed=1)
    output = quantizer(weight)
    output.backward(upstream)
    expected = (upstream * output.detach() / quantizer.scale.detach()).sum(1, keepdim=True)
    torch.testing.assert_close(quantizer.scale.grad, expected)


def test_a_learned_step_improves_on_hard_roundings() -> None:
    weight = draw(8, 64)
    quantizer = GenieM(weight, 2, range=MinMax())
    quantizer.harden()
    before = (quantizer(weight) - weight).square().mean().item()
    optimizer = torch.optim.Adam([quantizer.scale], lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(weight) - weight).square().mean().backward()
        optimizer.step()
    multiples = (quantizer.integers(weight)[0] - quantizer.zero_point).double()
    best = (multiples * weight).sum(1, keepdim=True) / multiples.square().sum(1, keepdim=True)  # least squares
    torch.testing.assert_close(quantizer.scale.detach().double(), best, rtol=1e-3, atol=1e-4)
    assert (quantizer(weight) - weight).square().mean().item() < before


def test_groups() -> None:
    quantizer = GenieM(draw(6, 40), 3, range=MinMax())
    bits, step = quantizer.parameter_groups()
    assert (bits["lr"], bits["kind"], step["lr"], step["kind"]) == (1e-3, "rounding", 1e-4, "scale")
    assert step["params"][0] is quantizer.scale
    quantizer = GenieM(draw(6, 40), 3, range=MinMax(), relative=True)
    assert quantizer.parameter_groups()[1]["lr"] == pytest.approx(1e-4 * quantizer.scale.mean().item())


def test_a_step_below_zero_stays_usable() -> None:
    weight = draw(6, 40)
    quantizer = GenieM(weight, 3, range=MinMax())
    with torch.no_grad():
        quantizer.scale.fill_(-1e-3)
    loss = (quantizer(weight) - weight).square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert bool((quantizer.scale.grad < 0).all())  # descent brings it back
    quantizer.harden()
    assert bool((quantizer.scale > 0).all())
