"""Scales that are powers of two, whoever chooses them, and weights without zero points."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quantizers.calibrate import calibrate_ranges
from quantizers.constraints import PowerOfTwo
from quantizers.convert import BitWidths, Conversion, convert
from quantizers.grid import Grid
from quantizers.layer import float_mode, quantizers_of
from quantizers.lsq import LSQ
from quantizers.nearest import Nearest, NearestActivation
from quantizers.protocol import Protocol
from quantizers.ranges import LpSearch, MinMax
from tests.quantizers.test_calibrate import network

PROTOCOL = Protocol(name="mine", placement="operands", image=8, symmetric_weights=True, power_of_two=True)
WEIGHT, ACTIVATION = partial(Nearest, range=LpSearch()), partial(NearestActivation, range=MinMax())


def converted(protocol: Protocol = PROTOCOL, **factories: object) -> tuple[nn.Module, Conversion]:
    teacher = network()
    given = {"weight": WEIGHT, "activation": ACTIVATION} | factories
    return teacher, convert(teacher, torch.zeros(1, 3, 6, 6), protocol, bits=BitWidths(4, 4), **given)  # type: ignore[arg-type]


def test_every_scale_is_a_power_of_two_and_weights_have_no_zero_point() -> None:
    teacher, conversion = converted()
    images = torch.randn(8, 3, 6, 6)
    calibrate_ranges(conversion.student, images, 4)
    found = dict(quantizers_of(conversion.student))
    assert len(found) > 5
    for path, quantizer in found.items():
        exponent = quantizer.scale.log2()
        assert torch.equal(exponent, exponent.round()), path
    weights = [q for path, q in found.items() if "weight" in path]
    assert all(not q.zero_point.any() and q.grid.signed for q in weights)
    assert any(bool(q.zero_point.any()) for path, q in found.items() if "site" in path)
    with torch.no_grad(), float_mode(conversion.student):
        torch.testing.assert_close(conversion.student(images), teacher(images))


class Nested(partial):  # type: ignore[type-arg]
    """As Hydra's: a partial of a partial of another class stays nested, with its range one level down."""


def test_the_range_of_a_nested_partial_is_found() -> None:
    _, conversion = converted(weight=Nested(Nearest, range=LpSearch()), activation=Nested(ACTIVATION))
    calibrate_ranges(conversion.student, torch.randn(8, 3, 6, 6), 4)
    assert all(torch.equal(q.scale.log2(), q.scale.log2().round()) for _, q in quantizers_of(conversion.student))


@given(st.floats(1e-6, 1e4), st.integers(0, 15))
def test_the_nearest_power_keeps_the_lower_end(scale: float, zero_point: int) -> None:
    s, z, grid = torch.tensor(scale), torch.tensor(float(zero_point)), Grid(4)
    rounded, moved = PowerOfTwo(MinMax()).settle(s, z, grid)
    assert 2**-0.5001 <= float(rounded / s) <= 2**0.5001
    assert grid.low <= float(moved) <= grid.high
    if 0 < float(moved) < grid.high:
        assert abs(float(moved * rounded - z * s)) <= float(rounded) / 2 * 1.001
    again = PowerOfTwo(MinMax()).settle(rounded, moved, grid)
    assert (again[0], again[1]) == (rounded, moved)


def test_learned_scales_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"activation: expected a quantizer with a fixed scale.*got LSQ; choose"):
        converted(activation=partial(LSQ, range=MinMax()))
    converted(replace(PROTOCOL, power_of_two=False), activation=partial(LSQ, range=MinMax()))


def test_a_factory_without_a_range_is_refused() -> None:
    with pytest.raises(ValueError, match="weight: expected a partial with a range"):
        converted(weight=lambda tensor, bits, **kwargs: Nearest(tensor, bits, range=MinMax(), **kwargs))


def test_rescaling_by_other_factors_is_refused() -> None:
    _, conversion = converted()
    quantizer = next(q for path, q in quantizers_of(conversion.student) if "weight" in path)
    quantizer.rescale(torch.full((4,), 2.0))
    with pytest.raises(ValueError, match="leave out the correction that rescales channels"):
        quantizer.rescale(torch.full((4,), 1.5))
