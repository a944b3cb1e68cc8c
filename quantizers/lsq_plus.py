"""LSQ+: learned step size and offset of an activation quantizer.

Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization", CVPR
Workshops 2020, arXiv 2004.09576, eq. 3-7. The offset is learned as a zero point, which is rounded to an integer of the
grid in `forward`: the paper's offset `beta` is `-scale * zero_point`, and zero stays exact, as padding and integer
inference need it. Both start at the calibrated range; the gradient scale is that of `lsq`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.affine import multiples, positive, within
from quantizers.base import Quantizer
from quantizers.grid import Grid, activation_grid
from quantizers.ranges import Range


class _LearnedStepAndOffset(torch.autograd.Function):
    """One node, one large tensor kept, and a clip between numbers, as in `lsq`; a third gradient for the offset."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, gradient_scale: float) -> Tensor:
        # A symmetric grid has its zero at 0; otherwise reading the number waits for the device, once a call.
        offset = 0.0 if grid.symmetric else _on_grid(zero_point, grid).item()
        position = x / scale
        ctx.save_for_backward(position, scale)
        ctx.lowest, ctx.highest, ctx.gradient_scale = grid.low - offset, grid.high - offset, gradient_scale
        return position.round().clamp_(ctx.lowest, ctx.highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        position, scale = ctx.saved_tensors
        bounds = ctx.lowest, ctx.highest
        slope = position.round().clamp_(*bounds).sub_(within(position, position, *bounds))
        d_scale = slope.mul_(grad).sum() * ctx.gradient_scale
        d_x, d_zero_point = within(grad, position, *bounds), None
        if ctx.needs_input_grad[2]:
            d_zero_point = (grad - d_x).sum() * (-scale * ctx.gradient_scale)
        return d_x, d_scale, d_zero_point, None, None


class LSQPlus(Quantizer):
    """Fake quantization of an activation whose scale and zero point are Parameters.

    Where zero is the middle or the lower end of the grid there is no offset to learn, and this is LSQ. The scale stays
    positive by a clamp in `forward` at 1e-12, the zero point on the grid by rounding and a clamp; gradients pass both.

    Args:
        bits: width, 2 to 16.
        signed: whether the operator before it can produce negative numbers.
        symmetric: for signed activations, whether the zero point is fixed at 0.
        range: how the first scale and zero point are chosen.
        lr: learning rate of the scale.
        offset_lr: learning rate of the offset `-scale * zero_point`, in the unit of the activation.
        relative: multiply both rates by the calibrated scale, for activations far from unit size.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool,
        symmetric: bool = False,
        range: Range,
        lr: float = 4e-5,
        offset_lr: float = 4e-5,
        relative: bool = False,
    ) -> None:
        super().__init__(activation_grid(bits, signed=signed, symmetric=symmetric), range, learn_scale=True)
        self.lr, self.offset_lr, self.relative = lr, offset_lr, relative
        if not self.grid.symmetric:
            zero_point = self.zero_point
            del self.zero_point
            self.zero_point = nn.Parameter(zero_point)

    def step(self) -> Tensor:
        """The scale, kept positive."""
        return positive(self.scale)

    def offset(self) -> Tensor:
        """The zero point, rounded and kept on the grid; gradients reach it through `fake_quantize` alone."""
        return _on_grid(self.zero_point, self.grid)

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z`, shape of `x`."""
        return multiples(x, self.step(), self.offset(), self.grid)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The same numbers as the nearest point, with the paper's gradients."""
        gradient_scale = 1 / math.sqrt(max(x.numel(), 1) * self.grid.high)
        return _LearnedStepAndOffset.apply(x, self.step(), self.zero_point, self.grid, gradient_scale)  # pyright: ignore[reportReturnType]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The scale at `lr`, and the zero point such that the offset moves by `offset_lr`; annealed by a cosine."""
        scale = self.step().item()
        unit = scale if self.relative else 1.0
        rates = [(self.scale, self.lr * unit)]
        if not self.grid.symmetric:
            rates.append((self.zero_point, self.offset_lr * unit / scale))
        return [{"params": [p], "lr": lr, "anneal": "cosine", "kind": "scale"} for p, lr in rates]

    @torch.no_grad()
    def harden(self) -> None:
        """Write the positive scale and the integer zero point that `forward` uses."""
        self.scale.copy_(self.step())
        self.zero_point.copy_(_on_grid(self.zero_point, self.grid))


def _on_grid(zero_point: Tensor, grid: Grid) -> Tensor:
    return zero_point.round().clamp(grid.low, grid.high)
