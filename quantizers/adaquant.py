"""AdaQuant: learns the weight itself, and its range, through straight-through rounding.

Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021, arXiv 2006.10518, eq. 2-3.
We deviate in the learning rates, which are relative to the layer's range by default: the published absolute ones suit
8 bits and weights of ordinary size only. The rates are annealed, because at a constant one the roundings near a
threshold keep flipping to the end. The range is learned as (scale, zero point) instead of (range, minimum).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantizers.affine import between, multiples, positive, round_straight_through
from quantizers.base import Quantizer
from quantizers.grid import weight_grid
from quantizers.ranges import Range


class AdaQuant(Quantizer):
    """`q(W + dW)` with dW, the scale and the zero point learned; at the first step it is rounding to nearest.

    The free weight is a Parameter that `initialize` fills, so the argument of `forward` gives dtype and device only.
    Gradients pass rounding unchanged and stop where a weight is clipped. The scale stays positive by a clamp at 1e-12
    through which the gradient passes; the zero point is rounded to an integer of the grid.

    Args:
        weight: (C, ...) the weight to quantize.
        bits: width, 2 to 16.
        channel_axis: axis with a scale of its own per index; None for one scale.
        symmetric: whether the zero point is fixed at 0.
        range: how the first scale and zero point are chosen.
        weight_lr: learning rate of the weight, as a share of the mean scale (published: 1e-5, absolute).
        range_lr: learning rate of both ends of the range, as a share of the range (published: 1e-3, absolute).
        learn_range: whether scale and zero point are learned as well.
        absolute: take both rates in the unit of the weight, as published.
        stated_for: steps that both rates are meant for; None: as many as the reconstruction says.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        *,
        channel_axis: int | None = 0,
        symmetric: bool = False,
        range: Range,
        weight_lr: float = 1e-3,
        range_lr: float = 1e-4,
        learn_range: bool = True,
        absolute: bool = False,
        stated_for: int | None = None,
    ) -> None:
        grid = weight_grid(bits, symmetric=symmetric)
        super().__init__(grid, range, weight=weight, channel_axis=channel_axis, learn_scale=learn_range)
        self.weight_lr, self.range_lr, self.learn_range, self.absolute = weight_lr, range_lr, learn_range, absolute
        self.stated_for = stated_for
        self.weight = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        if learn_range and not symmetric:
            zero_point = self.zero_point
            del self.zero_point
            self.zero_point = nn.Parameter(zero_point)
        self.initialize(weight)

    def initialize_state(self, x: Tensor) -> None:
        """Start the free weight at the float one."""
        self.weight.copy_(x)

    def rescale_state(self, factor: Tensor) -> None:
        """Multiply the free weight."""
        self.weight.mul_(factor)

    def step(self) -> Tensor:
        """The learned scale, kept positive."""
        return positive(self.scale)

    def offset(self) -> Tensor:
        """The learned zero point, rounded and kept on the grid."""
        return round_straight_through(between(self.zero_point, self.grid.low, self.grid.high))

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z` of the free weight."""
        return multiples(self.weight, self.step(), self.offset(), self.grid)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weight at `weight_lr`; scale and zero point such that the ends of the range move by `range_lr`."""
        scale, levels = self.step().mean().item(), self.grid.high - self.grid.low
        groups = [self._group(self.weight, self.weight_lr * (1 if self.absolute else scale), "weight")]
        range_lr = self.range_lr * (1 if self.absolute else scale * levels)
        if self.learn_range:
            groups.append(self._group(self.scale, range_lr / levels, "scale"))
        if self.learn_range and not self.grid.symmetric:
            groups.append(self._group(self.zero_point, range_lr / scale, "scale"))
        return groups

    def _group(self, parameter: Tensor, lr: float, kind: str) -> dict[str, Any]:
        return {"params": [parameter], "lr": lr, "anneal": "cosine", "kind": kind, "stated_for": self.stated_for}

    @torch.no_grad()
    def harden(self) -> None:
        """Write the scale and the zero point that `forward` uses, and the weight onto its grid."""
        quantized = self.fake_quantize(self.weight)
        self.scale.copy_(self.step())
        self.zero_point.copy_(self.offset())
        self.weight.copy_(quantized)
