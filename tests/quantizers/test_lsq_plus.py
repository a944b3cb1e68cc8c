"""LSQ+ against straight-through rounding written out for autograd, and against LSQ where there is no offset."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from quantizers.lsq import LSQ
from quantizers.lsq_plus import LSQPlus
from quantizers.ranges import LpSearch, MinMax


def make(scale: float, zero_point: float = 0.0, **options) -> LSQPlus:
    quantizer = LSQPlus(options.pop("bits", 3), range=MinMax(), **options)
    quantizer.set_range(torch.tensor(scale), torch.tensor(0.0))
    with torch.no_grad():
        quantizer.zero_point.fill_(zero_point)  # between two integers, as while learning
    return quantizer


def straight(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def written_out(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """The paper's quantizer with the offset `beta = -scale * z`; rounding passes gradients, clipping stops them."""
    z = straight(zero_point)
    position = x / scale
    below, above = position <= low - z, position >= high - z
    q = torch.where(below, low - z, torch.where(above, high - z, straight(position)))
    return scale * q


@pytest.mark.parametrize("zero_point", [0.0, 2.3, 2.5, 6.9])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_and_gradients_are_those_of_straight_through_rounding(bits: int, zero_point: float) -> None:
    zero_point = min(zero_point, 2**bits - 1)
    quantizer = make(0.37, zero_point, signed=True, bits=bits)
    x = torch.linspace(-5, 5, 101).requires_grad_()
    upstream = torch.randn(101, generator=torch.Generator().manual_seed(0))
    scale, z = (p.detach().double().requires_grad_() for p in (quantizer.scale, quantizer.zero_point))
    free = x.detach().double().requires_grad_()
    expected = written_out(free, scale, z, 0, 2**bits - 1)
    torch.testing.assert_close(quantizer(x), expected.float())
    theirs = torch.autograd.grad(expected, (free, scale, z), upstream.double())
    ours = torch.autograd.grad(quantizer(x), (x, quantizer.scale, quantizer.zero_point), upstream)
    g = 1 / math.sqrt(101 * (2**bits - 1))
    for a, b, factor in zip(ours, theirs, (1.0, g, g), strict=True):
        torch.testing.assert_close(a, (b * factor).float(), rtol=1e-4, atol=1e-5)


def test_the_offset_has_the_papers_gradient() -> None:
    """Eq. 7: with respect to `beta` 0 inside the range and 1 outside; `z = -beta / scale`."""
    quantizer = make(0.5, 2.0, signed=True)
    x = torch.tensor([-9.0, -0.9, 0.0, 1.2, 9.0, 8.0])
    quantizer(x).sum().backward()
    g = 1 / math.sqrt(6 * 7)
    assert quantizer.zero_point.grad is not None
    assert quantizer.zero_point.grad.item() == pytest.approx(3 * -0.5 * g)


@pytest.mark.parametrize("options", [{"signed": False}, {"signed": True, "symmetric": True}])
def test_without_an_offset_it_is_lsq(options: dict) -> None:
    ours = LSQPlus(3, range=LpSearch(), **options)
    lsq = LSQ(3, range=LpSearch(), **options)
    x = torch.randn(500, generator=torch.Generator().manual_seed(1))
    for quantizer in (ours, lsq):
        quantizer.initialize(x)
        quantizer(x).square().sum().backward()
    assert torch.equal(ours(x), lsq(x))
    assert torch.equal(ours.scale.grad, lsq.scale.grad)  # type: ignore[arg-type]
    assert not isinstance(ours.zero_point, nn.Parameter)
    assert len(ours.parameter_groups()) == 1


def test_it_starts_as_lsq_on_any_grid() -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(1)) + 0.7
    ours, lsq = LSQPlus(4, signed=True, range=LpSearch()), LSQ(4, signed=True, range=LpSearch())
    for quantizer in (ours, lsq):
        quantizer.initialize(x)
    assert torch.equal(ours(x), lsq(x))


def test_hardening_writes_an_integer_zero_point_and_a_positive_scale() -> None:
    x = torch.linspace(-3, 3, 50)
    for zero_point, expected in ((2.4, 2), (-3.0, 0), (11.0, 7)):
        quantizer = make(0.37, zero_point, signed=True)
        soft, offset = quantizer(x).detach(), quantizer.offset().item()
        quantizer.harden()
        assert quantizer.zero_point.item() == offset == expected
        assert torch.equal(quantizer(x), soft)
    with torch.no_grad():
        quantizer.scale.fill_(-0.01)
    assert bool(torch.isfinite(quantizer(x)).all())
    quantizer.harden()
    assert quantizer.scale > 0


def test_a_bad_offset_is_learned_away() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(2)) + 1.5
    quantizer = make(0.4, 7.0, signed=True, lr=3e-3, offset_lr=0.1)
    best = LSQPlus(3, signed=True, range=LpSearch(p=2.0))
    best.initialize(x)
    groups = quantizer.parameter_groups()
    optimizer = torch.optim.Adam([{"params": group["params"], "lr": group["lr"]} for group in groups])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 600)
    with torch.no_grad():
        entry = float((quantizer(x) - x).square().mean())
    for _ in range(600):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
        schedule.step()
    quantizer.harden()
    learned, least = (float((q(x) - x).square().mean().detach()) for q in (quantizer, best))
    assert learned < 0.05 * entry
    assert learned < 1.2 * least


def test_groups() -> None:
    quantizer = make(0.05, 3.0, signed=True)
    scale, offset = quantizer.parameter_groups()
    assert scale["params"][0] is quantizer.scale
    assert offset["params"][0] is quantizer.zero_point
    assert scale["lr"] == 4e-5
    assert offset["lr"] == pytest.approx(4e-5 / 0.05)
    scale, offset = make(0.05, 3.0, signed=True, lr=1e-3, offset_lr=2e-3, relative=True).parameter_groups()
    assert scale["lr"] == pytest.approx(5e-5)
    assert offset["lr"] == pytest.approx(2e-3)
