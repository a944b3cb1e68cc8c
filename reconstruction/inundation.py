"""Gradient inundation: an update of a weight is enlarged until enough of its integers change.

Choi et al., "It's All In the Teacher: Zero-Shot Quantization Brought Closer to the Teacher" (AIT), CVPR 2022, arXiv
2203.17008. Ours: the factor is found in closed form, where the released code searches, and what is enlarged is the
whole update, weight decay included, which that search leaves out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantizers.base import Quantizer

MARGIN = 2.0**-22  # of a position: a few units in float32's last place, so that no rounding stops short of an edge


class Inundation:
    """Multiplies an update by the least `a` >= 1 that moves enough integers.

    On its straight way a weight leaves its integer once and for all where it meets the edge ahead of it, so that `a` is
    an order statistic of the factors at which the weights of a tensor meet theirs.

    Args:
        share: of the integers of a tensor that have to change (0.001 for CIFAR in the released code).
        largest: an update that does too little even at this factor stays as it is.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(self, share: float = 0.001, *, largest: float = 65536.0) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share: expected a share of the integers in (0, 1], got {share}")
        if largest < 1:
            raise ValueError(f"largest: expected a factor of at least 1, got {largest}")
        self.share = share
        self.largest = largest

    @torch.no_grad()
    def __call__(self, quantizer: Quantizer, weight: Tensor, before: Tensor, update: Tensor) -> Tensor:
        """Set `weight` to `before + a * update`; return `a`, a scalar on their device.

        Args:
            quantizer: computes with `weight`, its own Parameter, at a fixed scale and zero point.
            weight: whatever it is now.
            before: what it was.
            update: what was to be added to that.
        """
        weight.copy_(before)
        scale, offset, grid = quantizer.step(), quantizer.offset(), quantizer.grid
        multiples, position = quantizer.hard_multiples(weight), before / scale
        margin = MARGIN * (1 + multiples.abs() + position.abs())
        up = update > 0
        edge = multiples + torch.where(up, 0.5 + margin, -0.5 - margin)
        moves = torch.where(up, multiples < grid.high - offset, multiples > grid.low - offset) & (update != 0)
        factors = torch.where(moves, (edge * scale - before) / update, math.inf)
        least = factors.flatten().kthvalue(math.ceil(self.share * factors.numel())).values.clamp(min=1.0)
        factor = torch.where(least.isfinite() & (least <= self.largest), least, 1.0)
        weight.copy_(before + factor * update)
        return factor
