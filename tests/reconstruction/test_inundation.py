"""Gradient inundation against a search by doubling and bisection, as the released code does it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.adaquant import AdaQuant
from quantizers.ranges import MinMax
from reconstruction.inundation import Inundation

WEIGHTS = 400


def a_weight(seed: int = 0, *, symmetric: bool = False, scale: float = 1e-4) -> tuple[AdaQuant, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    before = torch.randn(8, WEIGHTS // 8, generator=rng)
    quantizer = AdaQuant(before, 4, symmetric=symmetric, range=MinMax(), learn_range=False)
    before *= 1.3  # some stand outside the range, and come back or not
    return quantizer, before, scale * torch.randn(before.shape, generator=rng)


def changed(quantizer: AdaQuant, before: Tensor, after: Tensor) -> int:
    with torch.no_grad():
        quantizer.weight.copy_(before)
        integers = quantizer.multiples(before)
        quantizer.weight.copy_(after)
        return int((quantizer.multiples(after) != integers).sum())


def searched(quantizer: AdaQuant, before: Tensor, update: Tensor, needed: float) -> float:
    """The least factor, by doubling and bisection; infinity if none was found."""
    low = high = 1.0
    while changed(quantizer, before, before + high * update) < needed:
        low, high = high, 2 * high
        if high > 2**30:
            return math.inf
    for _ in range(40 if high > 1 else 0):
        middle = (low + high) / 2
        enough = changed(quantizer, before, before + middle * update) >= needed
        low, high = (low, middle) if enough else (middle, high)
    return high


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.floats(1e-3, 0.5), st.booleans(), st.sampled_from([1e-5, 1e-3, 1e-1]))
def test_the_factor_against_doubling_and_bisection(seed: int, share: float, symmetric: bool, scale: float) -> None:
    quantizer, before, update = a_weight(seed, symmetric=symmetric, scale=scale)
    factor = Inundation(share, largest=math.inf)(quantizer, quantizer.weight, before, update)
    after = quantizer.weight.detach().clone()
    torch.testing.assert_close(after, before + factor * update, rtol=0, atol=0)
    needed = share * WEIGHTS
    assert changed(quantizer, before, after) >= needed
    assert searched(quantizer, before, update, needed) <= float(factor)
    short = after - 1e-5 * quantizer.scale * update.sign()  # of a position: what float32's last places need
    assert factor == 1 or changed(quantizer, before, short) < needed


def test_an_update_that_moves_enough_stays() -> None:
    quantizer, before, update = a_weight(scale=1.0)
    assert Inundation(0.01)(quantizer, quantizer.weight, before, update) == 1.0
    assert torch.equal(quantizer.weight.detach(), before + update)


def test_an_update_that_cannot_move_enough_stays() -> None:
    quantizer, before, update = a_weight()
    outwards = before.sign() * update.abs() * (before.abs() > 2.5)  # beyond the last level, or towards it
    for moved in (torch.zeros_like(update), outwards):
        assert Inundation(0.5, largest=math.inf)(quantizer, quantizer.weight, before, moved) == 1.0
        assert torch.equal(quantizer.weight.detach(), before + moved)
    assert Inundation(0.5, largest=10.0)(quantizer, quantizer.weight, before, update) == 1.0
    assert Inundation(0.5, largest=1e6)(quantizer, quantizer.weight, before, update) > 10


@pytest.mark.parametrize("arguments", [{"share": 0.0}, {"share": 2.0}, {"largest": 0.5}])
def test_bad_numbers_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Inundation(**arguments)
