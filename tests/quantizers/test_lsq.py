"""LSQ's gradients against the closed form of the paper, element by element."""

from __future__ import annotations

import math

import pytest
import torch

from quantizers.affine import multiples, within
from quantizers.lsq import LSQ
from quantizers.ranges import MinMax


def make(scale: float, zero_point: float = 0.0, **options) -> LSQ:
    quantizer = LSQ(options.pop("bits", 3), range=MinMax(), **options)
    quantizer.set_range(torch.tensor(scale), torch.tensor(zero_point))
    return quantizer


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"signed": False}, 0, 7),
        ({"signed": True, "symmetric": True}, -4, 3),
        ({"signed": True, "zero_point": 2.0}, -2, 5),
    ],
)
def test_gradients_are_the_papers(options: dict, low: int, high: int) -> None:
    quantizer = make(0.37, **options)
    x = torch.linspace(-5, 5, 101).requires_grad_()
    upstream = torch.randn(101, generator=torch.Generator().manual_seed(0))
    g = 1 / math.sqrt(quantizer.grid.high)  # N = 1: one element at a time
    for i in range(101):
        element = x[i : i + 1]
        quantizer.scale.grad = None
        (dx,) = torch.autograd.grad(quantizer(element), element, upstream[i : i + 1], retain_graph=True)
        quantizer(element).backward(upstream[i : i + 1])
        v = x[i].item() / quantizer.scale.item()
        slope = low if v <= low else high if v >= high else round(v) - v
        assert quantizer.scale.grad.item() == pytest.approx(upstream[i].item() * slope * g, rel=1e-4, abs=1e-5)
        assert dx.item() == (upstream[i].item() if low < v < high else 0)


def test_what_stands_on_a_bound_is_outside() -> None:
    position = torch.tensor([-torch.inf, -3.1, -3.0, -2.9, 0.0, 3.9, 4.0, 4.1, torch.inf])
    values = torch.arange(1.0, 10.0)
    expected = torch.where((position > -3) & (position < 4), values, 0)
    assert torch.equal(within(values, position, -3.0, 4.0), expected)


def test_the_gradient_scale_counts_elements_and_levels() -> None:
    quantizer = make(0.2, signed=False, bits=4)
    x = torch.rand(7, 11, generator=torch.Generator().manual_seed(0)) * 5
    quantizer(x).sum().backward()
    v = x / 0.2
    slope = torch.where(v >= 15, torch.tensor(15.0), v.round() - v)
    assert quantizer.scale.grad.item() == pytest.approx(slope.sum().item() / math.sqrt(77 * 15), rel=1e-4)


def test_it_equals_the_composition_of_straight_through_operations() -> None:
    quantizer = make(0.2, signed=True, zero_point=3.0)
    x = torch.randn(200, generator=torch.Generator().manual_seed(1)).clamp(-0.69, 0.89).requires_grad_()
    scale = quantizer.scale.detach().clone().requires_grad_()
    composed = multiples(x, scale, quantizer.zero_point, quantizer.grid) * scale
    assert torch.equal(quantizer(x), composed)
    upstream = torch.randn(200)
    dx, ds = torch.autograd.grad(composed, (x, scale), upstream)
    ours_x, ours_s = torch.autograd.grad(quantizer(x), (x, quantizer.scale), upstream)
    clipped_by_rounding = (x / scale >= 4) | (x / scale <= -3)  # rounds onto the last level from outside the range
    torch.testing.assert_close(ours_x[~clipped_by_rounding], dx[~clipped_by_rounding])
    inside = x.detach()[~clipped_by_rounding]
    (ds,) = torch.autograd.grad(
        multiples(inside, scale, quantizer.zero_point, quantizer.grid) * scale, scale, upstream[~clipped_by_rounding]
    )
    (ours_s,) = torch.autograd.grad(quantizer(inside), quantizer.scale, upstream[~clipped_by_rounding])
    torch.testing.assert_close(ours_s, ds / math.sqrt(inside.numel() * 7), rtol=1e-4, atol=1e-6)


def test_a_scale_below_zero_stays_usable_and_returns() -> None:
    quantizer = make(0.1, signed=False)
    with torch.no_grad():
        quantizer.scale.fill_(-0.01)
    x = torch.rand(50)
    optimizer = torch.optim.Adam([quantizer.scale], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (quantizer(x) - x).square().mean()
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    assert quantizer.scale > 0.05
    with torch.no_grad():
        quantizer.scale.fill_(-0.01)
    quantizer.harden()
    assert quantizer.scale > 0


def test_learning_the_step_finds_the_least_squares_step() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(2)).relu()
    quantizer = make(x.max().item() / 7, signed=False)
    optimizer = torch.optim.Adam([quantizer.scale], lr=2e-3)
    for _ in range(400):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    candidates = torch.linspace(0.1, 0.6, 501)
    errors = [(torch.clamp(torch.round(x / s), 0, 7) * s - x).square().mean().item() for s in candidates]
    assert quantizer.scale.item() == pytest.approx(candidates[errors.index(min(errors))].item(), rel=0.05)


def test_groups() -> None:
    quantizer = make(0.05, signed=False)
    (group,) = quantizer.parameter_groups()
    assert group["params"][0] is quantizer.scale
    assert (group["lr"], group["anneal"], group["kind"]) == (4e-5, "cosine", "scale")
    (group,) = make(0.05, signed=False, lr=1e-3, relative=True).parameter_groups()
    assert group["lr"] == pytest.approx(5e-5)
