"""What a student's numbers are as integers: weights with their scales and zero points, and the grids of activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from quantizers.grid import Grid
from quantizers.layer import output_first, quantized_layers, sites


class IntegerWeight(NamedTuple):
    """`(integers - zero_point) * scale` is the weight that the student computes with, bit for bit.

    `integers` int32, output channels first (a transposed convolution's weight is turned so); `scale` float32 and
    `zero_point` int32 broadcast against it; `bits`, `low` and `high`: the grid.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    low: int
    high: int


class ActivationGrid(NamedTuple):
    """`clip(round(x / scale) + zero_point, low, high)` are a tensor's integers, with one scale and one zero point."""

    scale: float
    zero_point: int
    bits: int
    low: int
    high: int


@torch.no_grad()
def integer_weights(student: nn.Module) -> dict[str, IntegerWeight]:
    """Layer path -> its weight; layers that stay in float are left out."""
    found = {}
    for path, layer in quantized_layers(student):
        if layer.enabled:
            q, scale, zero_point = layer.weight_quantizer.integers(output_first(layer.layer))
            found[path] = IntegerWeight(q, scale, zero_point.to(torch.int32), *_ends(layer.weight_quantizer.grid))
    return found


@torch.no_grad()
def activation_grids(student: nn.Module) -> dict[str, ActivationGrid]:
    """Path of the site -> its grid; tensors that no calibration image reached stay in float and are left out."""
    found = {}
    for path, site in sites(student):
        if site.enabled:
            quantizer = site.quantizer
            grid = _ends(quantizer.grid)
            found[path] = ActivationGrid(float(quantizer.step()), int(quantizer.offset()), *grid)
    return found


def _ends(grid: Grid) -> tuple[int, int, int]:
    return grid.bits, grid.low, grid.high
