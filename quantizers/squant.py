"""SQuant: rounds weights without data so that the errors of a kernel, and of a channel, cancel.

Guo et al., "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation", ICLR 2022, arXiv 2202.07471,
algorithms 1 and 2. Beside each weight's own error the objective counts the absolute sum of the errors of every kernel
and of every output channel. Rounding to nearest comes first; then as few weights as possible, those nearest to the
middle between two levels, go to their other neighbour: until sums of kernels are within half a step, then until sums of
channels are, which may take a kernel's up to one step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.affine import multiples
from quantizers.base import Quantizer
from quantizers.grid import weight_grid
from quantizers.ranges import Range


class SQuant(Quantizer):
    """Rounds a weight so that errors cancel; nothing is learned.

    `forward` uses the roundings chosen by `initialize`, so its argument gives dtype and device only.

    Args:
        weight: (C, ...) the weight to quantize; the axes behind the second are one kernel.
        bits: width, 2 to 16.
        channel_axis: axis with a scale of its own per index; None for one scale. Errors are summed along axis 0.
        symmetric: whether the zero point is fixed at 0.
        range: how scale and zero point are chosen.
    """

    rounded: Tensor  # q - z

    def __init__(
        self, weight: Tensor, bits: int, *, channel_axis: int | None = 0, symmetric: bool = False, range: Range
    ) -> None:
        super().__init__(weight_grid(bits, symmetric=symmetric), range, weight=weight, channel_axis=channel_axis)
        self.register_buffer("rounded", torch.zeros_like(weight, dtype=torch.float32))
        self.initialize(weight)

    def initialize_state(self, x: Tensor) -> None:
        """Choose the roundings for the range that was set."""
        nearest = multiples(x, self.scale, self.zero_point, self.grid)
        bounds = (torch.broadcast_to(end - self.zero_point, x.shape) for end in (self.grid.low, self.grid.high))
        kernels = (len(x), -1, x[0, 0].numel()) if x.dim() > 1 else (1, 1, -1)
        chosen = squant(*(t.reshape(kernels) for t in (nearest, x / self.scale, *bounds)))
        self.rounded.copy_(chosen.reshape(x.shape))

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z`, shape of the weight."""
        return self.rounded


@torch.no_grad()
def squant(nearest: Tensor, exact: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Return the roundings, in steps from zero; all (channels, kernels, elements).

    Args:
        nearest: the multiples that rounding to nearest gives.
        exact: the weights in steps.
        lowest: the least multiple on the grid.
        highest: the greatest.
    """
    q = nearest
    if q.shape[-1] > 1:
        q = q - _excess(q, exact, lowest, highest)
    # One channel's kernels are to their sum what a kernel's elements are to theirs: of the kernels that err most, the
    # element that errs most, which may be one that goes back to its nearest level.
    error = q - exact
    total = error.sum((1, 2), keepdim=True)
    sign = total.sign()
    gain = torch.where(_can_move(q, error, sign, lowest, highest), error * sign, -torch.inf)
    best, element = gain.max(-1, keepdim=True)
    sums = torch.where(best > 0, error.sum(-1, keepdim=True) * sign, -torch.inf)
    moves = _largest(sums, total.abs().round(), dim=1)
    return q - torch.zeros_like(q).scatter_(-1, element, moves * sign)


def _excess(q: Tensor, exact: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """What to take from each multiple, -1, 0 or 1, so that the errors of a kernel sum to at most one half."""
    error = q - exact
    total = error.sum(-1, keepdim=True)
    sign = total.sign()
    gain = torch.where(_can_move(q, error, sign, lowest, highest), error * sign, -torch.inf)
    return _largest(gain, total.abs().round(), dim=-1) * sign


def _can_move(q: Tensor, error: Tensor, sign: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Whether going one level against `sign` reduces the sum, leaves an error below one step, and stays on the grid."""
    target = q - sign
    return (error * sign > 0) & (target >= lowest) & (target <= highest)


def _largest(values: Tensor, count: Tensor, dim: int) -> Tensor:
    """1.0 at the `count` largest values along `dim`, of those above minus infinity; 0.0 elsewhere."""
    rank = values.argsort(dim=dim, descending=True, stable=True).argsort(dim=dim)
    return ((rank < count) & (values > -torch.inf)).to(count.dtype)
