"""LSQ: learned step size of an activation quantizer.

Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153, eq. 1-5. The step starts at the calibrated
scale, not at 2 mean|x| / sqrt(Qp); a zero point, where there is one, stays fixed (LSQ+ would learn it). N in the
gradient scale counts all elements of the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantizers.affine import multiples, positive, within
from quantizers.base import Quantizer
from quantizers.grid import activation_grid
from quantizers.ranges import Range


class _LearnedStep(torch.autograd.Function):
    """One node instead of eight: keeps a single tensor for backward, and clips between numbers, not tensors, which
    is several times faster on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lowest: float, highest: float, gradient_scale: float) -> Tensor:
        position = x / scale
        ctx.save_for_backward(position)
        ctx.lowest, ctx.highest, ctx.gradient_scale = lowest, highest, gradient_scale
        return position.round().clamp_(lowest, highest).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (position,) = ctx.saved_tensors
        bounds = ctx.lowest, ctx.highest
        slope = position.round().clamp_(*bounds).sub_(within(position, position, *bounds))
        return within(grad, position, *bounds), slope.mul_(grad).sum() * ctx.gradient_scale, None, None, None


class LSQ(Quantizer):
    """Fake quantization of an activation whose scale is a Parameter.

    The scale stays positive by a clamp in `forward` at 1e-12, through which the gradient passes.

    Args:
        bits: width, 2 to 16.
        signed: whether the operator before it can produce negative numbers.
        symmetric: for signed activations, whether the zero point is fixed at 0.
        range: how the first scale, and the zero point, are chosen.
        lr: learning rate of the scale.
        relative: multiply `lr` by the calibrated scale, for activations far from unit size.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool,
        symmetric: bool = False,
        range: Range,
        lr: float = 4e-5,
        relative: bool = False,
    ) -> None:
        super().__init__(activation_grid(bits, signed=signed, symmetric=symmetric), range, learn_scale=True)
        self.lr = lr
        self.relative = relative

    def step(self) -> Tensor:
        """The scale, kept positive."""
        return positive(self.scale)

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z`, shape of `x`."""
        return multiples(x, self.step(), self.zero_point, self.grid)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The same numbers as the nearest point, with the paper's gradients."""
        # A symmetric grid has its zero at 0; otherwise reading the number waits for the device, once a call.
        zero_point = 0.0 if self.grid.symmetric else self.zero_point.item()
        lowest, highest = self.grid.low - zero_point, self.grid.high - zero_point
        gradient_scale = 1 / math.sqrt(max(x.numel(), 1) * self.grid.high)
        return _LearnedStep.apply(x, self.step(), lowest, highest, gradient_scale)  # pyright: ignore[reportReturnType]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The scale at `lr`, annealed by a cosine."""
        lr = self.lr * self.step().item() if self.relative else self.lr
        return [{"params": [self.scale], "lr": lr, "anneal": "cosine", "kind": "scale"}]

    @torch.no_grad()
    def harden(self) -> None:
        """Write the positive scale that `forward` uses."""
        self.scale.copy_(self.step())
