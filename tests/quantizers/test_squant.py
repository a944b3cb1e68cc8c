"""SQuant against brute force over all roundings, and the bounds it promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.nearest import Nearest
from quantizers.ranges import MinMax
from quantizers.squant import SQuant


def a_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(quantizer: SQuant | Nearest, weight: Tensor) -> Tensor:
    """Rounding errors in steps, (channels, kernels, elements), in float64."""
    steps = quantizer.multiples(weight).double() - weight.double() / quantizer.scale.double()
    return steps.reshape(weight.shape[0], weight.shape[1] if weight.dim() > 1 else 1, -1)


@pytest.mark.parametrize("seed", range(20))
def test_one_kernel_against_brute_force(seed: int) -> None:
    """Of all roundings up or down whose errors sum to at most one half, the one with the least squared error."""
    weight = a_weight(1, 1, 3, 3, seed=seed)
    quantizer = SQuant(weight, 8, range=MinMax())
    steps = (weight / quantizer.scale).flatten().double()
    best, least = None, float("inf")
    for ups in itertools.product((0.0, 1.0), repeat=9):
        q = steps.floor() + torch.tensor(ups, dtype=torch.float64)
        error = q - steps
        inside = bool(
            (
                (q >= quantizer.grid.low - quantizer.zero_point.flatten())
                & (q <= quantizer.grid.high - quantizer.zero_point.flatten())
            ).all()
        )
        if inside and error.sum().abs() <= 0.5 and error.square().sum() < least:
            best, least = q, float(error.square().sum())
    assert best is not None
    assert torch.equal(quantizer.multiples(weight).flatten().double(), best)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    out=st.integers(1, 5),
    inp=st.integers(1, 6),
    size=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 999),
)
def test_sums_of_channels_and_kernels_are_bounded(bits: int, out: int, inp: int, size: int, seed: int) -> None:
    weight = a_weight(out, inp, size, size, seed=seed)
    error = errors(SQuant(weight, bits, range=MinMax()), weight)
    if inp * size * size > 20:  # in a small channel the two ends of the range, which cannot move outwards, weigh much
        assert float(error.sum((1, 2)).abs().max()) <= 0.5 + 1e-4
    assert float(error.sum(-1).abs().max()) <= 1 + 1e-4
    assert float(error.abs().max()) < 1 + 1e-5


def test_kernel_sums_stay_within_one_step_and_shrink() -> None:
    weight = a_weight(16, 32, 3, 3)
    nearest, ours = (errors(kind(weight, 4, range=MinMax()), weight) for kind in (Nearest, SQuant))
    assert float(nearest.sum(-1).abs().max()) > 1.5
    assert float(ours.sum(-1).abs().max()) <= 1.0 + 1e-4
    assert float(ours.sum((1, 2)).abs().max()) <= 0.5 + 1e-4


def test_linear_layers_balance_rows() -> None:
    weight = a_weight(10, 64)
    nearest, ours = (errors(kind(weight, 4, range=MinMax()), weight) for kind in (Nearest, SQuant))
    assert float(nearest.sum((1, 2)).abs().max()) > 1
    assert float(ours.sum((1, 2)).abs().max()) <= 0.5 + 1e-4


def test_constant_inputs_lose_less_than_with_rounding_to_nearest() -> None:
    """What the objective stands for: on inputs that are alike, errors that cancel do not reach the output."""
    weight = a_weight(8, 16, 3, 3)
    ones = torch.ones(1, 16, 3, 3)
    exact = torch.nn.functional.conv2d(ones, weight)
    gaps = [
        (torch.nn.functional.conv2d(ones, kind(weight, 4, range=MinMax())(weight)) - exact).abs().mean()
        for kind in (SQuant, Nearest)
    ]
    assert float(gaps[0]) < 0.2 * float(gaps[1])
