"""Compares candidate ranges of many channels at once by the Lp error of the values they would round."""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.affine import SMALLEST_SCALE
from quantizers.grid import Grid


class CandidateSearch:
    """The best candidate of every channel so far; a later one has to be strictly better.

    Args:
        points: (C, K) values of each channel.
        counts: (K,) how often each occurs; None for once.
        grid: the integers to use.
        p: exponent of the error.
        scale: (C,) the widest scale, which candidates shrink.
        zero_point: (C,) the zero point that belongs to it.
    """

    def __init__(
        self, points: Tensor, counts: Tensor | None, grid: Grid, p: float, scale: Tensor, zero_point: Tensor
    ) -> None:
        self.points, self.counts, self.grid, self.p = points, counts, grid, p
        self.widest = scale
        self.scale, self.zero_point, self.index = scale.clone(), zero_point.clone(), torch.zeros_like(scale)
        self.error = torch.full_like(scale, torch.inf, dtype=torch.float64)

    def offer(self, shrink: Tensor, zero_point: Tensor, index: Tensor) -> None:
        """Try `shrink` times the widest scale with `zero_point`, all (C,)."""
        scale = (self.widest * shrink).clamp(min=SMALLEST_SCALE)
        zero_point = zero_point.clamp(self.grid.low, self.grid.high)
        error = self._error(scale.unsqueeze(1), zero_point.unsqueeze(1))
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)
        self.index = torch.where(better, index, self.index)

    def _error(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`sum |x - q(x)|^p` of each channel in units of the widest scale, which keeps tiny weights from underflow."""
        steps = (self.points / scale).round_().clamp_(self.grid.low - zero_point, self.grid.high - zero_point)
        distance = steps.mul_(scale).sub_(self.points).div_(self.widest.unsqueeze(1)).abs_().pow_(self.p)
        return distance.sum(1, dtype=torch.float64) if self.counts is None else (distance * self.counts).sum(1)
