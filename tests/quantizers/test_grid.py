"""The integer grid."""

from __future__ import annotations

import pytest
import torch

from quantizers.grid import Grid, activation_grid, weight_grid


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, torch.int8), (8, torch.uint8), (16, torch.int16), (16, torch.uint16)], ids=str
)
def test_ends_are_those_of_the_machine_integers(bits: int, dtype: torch.dtype) -> None:
    grid = Grid(bits, signed=dtype.is_signed)
    assert (grid.low, grid.high) == (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("signed", [False, True])
def test_there_are_2_to_the_bits_integers(bits: int, signed: bool) -> None:
    grid = Grid(bits, signed=signed)
    assert len(range(grid.low, grid.high + 1)) == 2**bits


@pytest.mark.parametrize("bits", [1, 0, -4, 17, 32, 4.0, True, "4"])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"bits: expected an integer from 2 to 16, got"):
        Grid(bits)


def test_weight_grids() -> None:
    assert (weight_grid(4, symmetric=True).low, weight_grid(4, symmetric=True).high) == (-8, 7)
    assert (weight_grid(4, symmetric=False).low, weight_grid(4, symmetric=False).high) == (0, 15)


def test_activation_grids() -> None:
    assert activation_grid(4, signed=False, symmetric=False).one_sided
    assert activation_grid(4, signed=False, symmetric=True).one_sided
    assert activation_grid(4, signed=True, symmetric=False) == Grid(4)
    assert activation_grid(4, signed=True, symmetric=True) == Grid(4, signed=True, symmetric=True)
