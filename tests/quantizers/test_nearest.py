"""Rounding to nearest against torch's own fake quantization."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantizers.nearest import Nearest, NearestActivation
from quantizers.ranges import LpSearch, MinMax

CASES = list(itertools.product((2, 3, 4, 8), (False, True)))


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_per_tensor_equals_torch_forward_and_backward(bits: int, symmetric: bool) -> None:
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(bits)).requires_grad_()
    quantizer = NearestActivation(bits, signed=True, symmetric=symmetric, range=LpSearch())
    quantizer.initialize(x)
    grid = quantizer.grid
    # A power of two makes torch's multiplication by the reciprocal exact, so that ties fall alike.
    quantizer.set_range(torch.exp2(quantizer.scale.log2().floor()), quantizer.zero_point)
    scale, zero_point = quantizer.scale.item(), int(quantizer.zero_point.item())
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, grid.low, grid.high)
    assert torch.equal(quantizer(x), expected)
    gradient = torch.randn_like(x)
    (ours,) = torch.autograd.grad(quantizer(x), x, gradient)
    (theirs,) = torch.autograd.grad(expected, x, gradient)
    assert torch.equal(ours, theirs)
    assert 0 < (ours == 0).float().mean() < 1


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("axis", [0, 1, -3])
def test_per_channel_equals_torch(bits: int, symmetric: bool, axis: int) -> None:
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(bits))
    quantizer = Nearest(weight, bits, channel_axis=axis, symmetric=symmetric, range=LpSearch())
    quantizer.set_range(torch.exp2(quantizer.scale.log2().floor()), quantizer.zero_point)
    scale, zero_point = quantizer.scale.flatten(), quantizer.zero_point.flatten().int()
    expected = torch.fake_quantize_per_channel_affine(
        weight, scale, zero_point, axis % 4, quantizer.grid.low, quantizer.grid.high
    )
    assert torch.equal(quantizer(weight), expected)


@pytest.mark.parametrize("axis", [None, 0])
def test_any_scale_agrees_with_torch_up_to_ties(axis: int | None) -> None:
    weight = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    quantizer = Nearest(weight, 4, channel_axis=axis, range=MinMax())
    scale, zero_point = quantizer.scale.expand(8, 1).flatten(), quantizer.zero_point.expand(8, 1).flatten().int()
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, 0, 15)
    difference = (quantizer(weight) - expected).abs()
    assert (difference > 1e-6).float().mean() < 1e-3


def test_unsigned_activations_start_at_zero() -> None:
    quantizer = NearestActivation(4, signed=False, range=MinMax())
    quantizer.initialize(torch.tensor([-5.0, 0.0, 3.0]))
    assert quantizer.zero_point.item() == 0
    assert quantizer.scale.item() == pytest.approx(3 / 15)
    assert quantizer(torch.tensor([-5.0, 0.0, 3.0, 9.0])).tolist() == pytest.approx([0, 0, 3, 3])


def test_state_is_filled_in_place() -> None:
    quantizer = NearestActivation(4, signed=False, range=MinMax())
    scale = quantizer.scale
    quantizer.initialize(torch.rand(10))
    assert quantizer.scale is scale
    assert quantizer.scale.shape == ()
    assert quantizer.parameter_groups() == []
    assert quantizer.soft_fraction() == 0
    assert quantizer.regularizer(1.0).item() == 0


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        ([1.0, 2.0], [0.0], "scale: expected 1 or 3 elements"),
        ([1.0, -2.0, 1.0], [0.0], "scale: expected positive and finite"),
        ([1.0, float("nan"), 1.0], [0.0], "scale: expected positive and finite"),
        ([1.0], [0.5], "zero_point: expected integers from 0 to 15"),
        ([1.0], [16.0], "zero_point: expected integers from 0 to 15"),
    ],
)
def test_impossible_ranges_are_refused(scale: list[float], zero_point: list[float], message: str) -> None:
    quantizer = Nearest(torch.randn(3, 4), 4, range=MinMax())
    with pytest.raises(ValueError, match=message):
        quantizer.set_range(torch.tensor(scale), torch.tensor(zero_point))


def test_a_missing_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"channel_axis: expected an axis of a weight of shape \(3, 4\), got 2"):
        Nearest(torch.randn(3, 4), 4, channel_axis=2, range=MinMax())
