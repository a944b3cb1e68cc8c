"""A histogram of a stream of tensors whose range is not known in advance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_EXPONENT = -100  # bin width of a stream that has shown only zeros
CHUNK = 2**22  # elements binned at once: bounds the memory of the int64 indices


class RunningHistogram:
    """Counts in bins `[k w, (k + 1) w)`, the width w a power of two that doubles whenever the data outgrow the bins.

    Zero is always an edge and inside the range. Doubling merges bins in pairs, which is exact, so the result depends
    on neither the order of the data nor how they were cut into batches. Resolution: w is below
    `2 (max - min) / (bins - 2)`, with zero counted into min and max.

    Args:
        bins: number of bins kept; memory is 8 bytes for each.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.exponent = SMALLEST_EXPONENT
        self.first = 0  # index k of counts[0]
        self.counts: Tensor | None = None  # (bins,) int64
        self.minimum = 0.0
        self.maximum = 0.0

    def update(self, x: Tensor, minimum: float, maximum: float) -> None:
        """Count the elements of `x`, which lie between `minimum` and `maximum`, both finite."""
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)
        if self.counts is None:
            self.counts = torch.zeros(self.bins, dtype=torch.int64, device=x.device)
        exponent = self.exponent
        while self._last(exponent) - self._first(exponent) >= self.bins:
            exponent += 1
        self._regrid(exponent)
        for chunk in x.detach().flatten().split(CHUNK):
            index = torch.floor(chunk.double() * 2.0**-exponent).long() - self.first
            self.counts += torch.bincount(index, minlength=self.bins)

    def points(self) -> tuple[Tensor, Tensor]:
        """Midpoints of the occupied bins (K,) in float32 and their counts (K,) in float64."""
        if self.counts is None:
            raise ValueError("observer: expected at least one update before compute, got none")
        occupied = self.counts.nonzero().squeeze(1)
        middle = (occupied.double() + self.first + 0.5) * 2.0**self.exponent
        return middle.clamp(self.minimum, self.maximum).float(), self.counts[occupied].double()

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self.exponent

    def _first(self, exponent: int) -> int:
        return math.floor(math.ldexp(self.minimum, -exponent))

    def _last(self, exponent: int) -> int:
        return math.floor(math.ldexp(self.maximum, -exponent))

    def _regrid(self, exponent: int) -> None:
        """Move the counts to bins of width `2^exponent` that start at the minimum."""
        assert self.counts is not None
        first = self._first(exponent)
        if exponent == self.exponent and first == self.first:
            return
        occupied = self.counts.nonzero().squeeze(1)
        index = torch.div(occupied + self.first, 2 ** min(exponent - self.exponent, 62), rounding_mode="floor") - first
        counts = torch.zeros_like(self.counts)
        counts.index_add_(0, index, self.counts[occupied])
        self.counts, self.first, self.exponent = counts, first, exponent
