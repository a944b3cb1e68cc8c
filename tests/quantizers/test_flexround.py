"""FlexRound: the equation of the paper, its gradients, and a layer that it improves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantizers.flexround import FlexRound
from quantizers.nearest import Nearest
from quantizers.ranges import LpSearch, MinMax


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturb(quantizer: FlexRound) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(quantizer.parameters()):
            parameter.copy_(0.2 * draw(*parameter.shape, seed=i))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_starts_exactly_at_nearest(bits: int, axis: int | None, symmetric: bool) -> None:
    for weight in (draw(6, 4, 3, 3), draw(5, 7)):
        options = {"channel_axis": axis, "symmetric": symmetric, "range": LpSearch()}
        assert torch.equal(FlexRound(weight, bits, **options)(weight), Nearest(weight, bits, **options)(weight))


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4)])
def test_it_is_the_equation_of_the_paper(shape: tuple[int, ...]) -> None:
    weight = draw(*shape)
    quantizer = FlexRound(weight, 4, range=MinMax())
    perturb(quantizer)
    parameters = {name: p.detach().double().exp() for name, p in quantizer.named_parameters()}
    s1 = quantizer.scale.double() * parameters["log_s1"]
    divisor = s1 * parameters["log_S2"] * parameters["log_s3"] * parameters.get("log_s4", 1.0)
    z = quantizer.zero_point.double()
    expected = (torch.clamp(torch.round(weight.double() / divisor) + z, 0, 15) - z) * s1
    torch.testing.assert_close(quantizer(weight).double(), expected, rtol=1e-5, atol=1e-6)
    assert ("log_s4" in parameters) == (len(shape) == 4)
    assert not torch.equal(quantizer(weight), Nearest(weight, 4, range=MinMax())(weight))


@pytest.mark.parametrize(
    ("axis", "out_shape", "in_shape"), [(0, (6, 1, 1, 1), (1, 4, 1, 1)), (1, (1, 4, 1, 1), (6, 1, 1, 1))]
)
def test_channel_divisors_lie_along_their_axes(axis: int, out_shape: tuple, in_shape: tuple) -> None:
    quantizer = FlexRound(draw(6, 4, 3, 3), 4, channel_axis=axis, range=MinMax())
    assert quantizer.log_s4 is not None
    assert (quantizer.log_s3.shape, quantizer.log_s4.shape) == (out_shape, in_shape)


def test_the_gradient_of_a_divisor_grows_with_the_weight() -> None:
    weight = draw(6, 40)
    quantizer = FlexRound(weight, 8, range=MinMax())
    upstream = draw(6, 40, seed=1)
    quantizer(weight).backward(upstream)
    # d/dlogS of s round(W / (s S)) is -W with straight-through rounding.
    torch.testing.assert_close(quantizer.log_S2.grad, -upstream * weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.log_s3.grad, -(upstream * weight).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_hardening_folds_the_step_and_keeps_every_number() -> None:
    weight = draw(6, 4, 3, 3)
    quantizer = FlexRound(weight, 4, range=MinMax())
    perturb(quantizer)
    before, scale = quantizer(weight), quantizer.step().detach()
    quantizer.harden()
    assert torch.equal(quantizer(weight), before)
    assert torch.equal(quantizer.scale, scale)


def test_learned_on_a_layer_it_beats_nearest() -> None:
    inputs = (draw(256, 32, seed=1) @ draw(32, 32, seed=2) / 6).relu()
    left = []
    for seed in (0, 3, 4):  # many channels of several layers, since what one learns hangs on a processor's last bits
        weight = draw(512, 32, seed=seed)
        target = inputs @ weight.T
        quantizer = FlexRound(weight, 3, range=LpSearch())
        nearest = (inputs @ quantizer(weight).T - target).square().mean().item()
        optimizer = torch.optim.Adam([{"params": g["params"], "lr": g["lr"]} for g in quantizer.parameter_groups()])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for _ in range(300):
            optimizer.zero_grad()
            (inputs @ quantizer(weight).T - target).square().mean().backward()
            optimizer.step()
            schedule.step()
        left.append((inputs @ quantizer(weight).T - target).square().mean().item() / nearest)
    assert sum(left) / len(left) < 0.8


def test_groups() -> None:
    quantizer = FlexRound(draw(6, 4, 3, 3), 4, range=MinMax())
    divisors, step = quantizer.parameter_groups()
    assert len(divisors["params"]) == 3
    assert (divisors["lr"], divisors["kind"], step["kind"]) == (3e-3, "rounding", "scale")
    fixed = FlexRound(draw(6, 4), 4, range=MinMax(), learn_scale=False)
    assert [len(g["params"]) for g in fixed.parameter_groups()] == [2]
