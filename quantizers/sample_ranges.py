"""Ranges from the extremes of single samples, as the data-free literature calibrates its networks.

Mean over the samples of each one's smallest and largest value: as in the released code of DSG (Zhang et al., CVPR 2021,
arXiv 2103.01049) and CalibTIP (Hubara et al., ICML 2021, arXiv 2006.10518). Unlike min-max it does not grow with the
number of samples, and clips what few of them reach.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.affine import from_bounds
from quantizers.grid import Grid
from quantizers.ranges import MinMax, Observer, Range


class SampleMinMax(Range):
    """The mean of the samples' smallest values, and that of their largest; samples stand along the first axis."""

    def fit(self, x: Tensor, grid: Grid, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
        """See `Range.fit`; `ValueError` also for a channel axis, since a weight has no samples."""
        if channel_axis is not None:
            raise ValueError(
                f"range: SampleMinMax is for activations, whose first axis counts samples, got channel_axis "
                f"{channel_axis}; choose MinMax, Percentile or LpSearch for weights"
            )
        observer = self.observer(grid)
        observer.update(x)
        return observer.compute()

    def observer(self, grid: Grid) -> Observer:
        """Running means, weighted by samples; exact."""
        return _SampleMinMaxObserver(grid)


class _SampleMinMaxObserver(Observer):
    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.sums: Tensor | None = None  # of minima, of maxima, of samples; float64
        self.check = MinMax().observer(grid)

    def update(self, x: Tensor) -> None:
        self.check.update(x)  # refuses what is empty or not finite
        samples = x.detach().float().reshape(len(x) if x.dim() else 1, -1)
        low, high = samples.amin(1).double().sum(), samples.amax(1).double().sum()
        found = torch.stack([low, high, torch.full_like(low, len(samples))])
        self.sums = found if self.sums is None else self.sums + found

    def compute(self) -> tuple[Tensor, Tensor]:
        if self.sums is None:
            raise ValueError("observer: expected at least one update before compute, got none")
        low, high = (self.sums[:2] / self.sums[2]).float().unsqueeze(1)
        scale, zero_point = from_bounds(low, high, self.grid)
        return scale.squeeze(0), zero_point.squeeze(0)
