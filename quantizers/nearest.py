"""Rounding to the nearest point of a fixed grid: nothing is learned (section 2 of Nagel et al., arXiv 2106.08295)."""

from __future__ import annotations

from torch import Tensor

from quantizers.affine import multiples
from quantizers.base import Quantizer
from quantizers.grid import activation_grid, weight_grid
from quantizers.ranges import Range


class Nearest(Quantizer):
    """Rounds a weight to nearest.

    Args:
        weight: (C, ...) the weight to choose the range on.
        bits: width, 2 to 16.
        channel_axis: axis with a scale of its own per index; None for one scale.
        symmetric: whether the zero point is fixed at 0.
        range: how scale and zero point are chosen.
    """

    def __init__(
        self, weight: Tensor, bits: int, *, channel_axis: int | None = 0, symmetric: bool = False, range: Range
    ) -> None:
        super().__init__(weight_grid(bits, symmetric=symmetric), range, weight=weight, channel_axis=channel_axis)
        self.initialize(weight)

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z`, shape of `x`."""
        return multiples(x, self.scale, self.zero_point, self.grid)


class NearestActivation(Quantizer):
    """Rounds an activation to nearest, with one fixed scale for the tensor.

    Args:
        bits: width, 2 to 16.
        signed: whether the operator before it can produce negative numbers.
        symmetric: for signed activations, whether the zero point is fixed at 0.
        range: how scale and zero point are chosen.
    """

    def __init__(self, bits: int, *, signed: bool, symmetric: bool = False, range: Range) -> None:
        super().__init__(activation_grid(bits, signed=signed, symmetric=symmetric), range)

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z`, shape of `x`."""
        return multiples(x, self.scale, self.zero_point, self.grid)
