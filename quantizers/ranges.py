"""Range estimation: which scale and zero point a tensor gets.

Min-max and percentile are folklore (Nagel et al., arXiv 2106.08295, section 3.1); the Lp search with p = 2.4 is that of
BRECQ (Li et al., ICLR 2021, arXiv 2102.05426) and QDrop (Wei et al., ICLR 2022, arXiv 2203.05740), for all channels
at once and with a coarse-to-fine search where they try every zero point.

Zero always lies on the grid. A channel of zeros takes the largest scale of the tensor, or 1 if all are zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from quantizers.affine import from_bounds
from quantizers.candidates import CandidateSearch
from quantizers.grid import Grid
from quantizers.histogram import RunningHistogram


class Observer(ABC):
    """Sees the batches of one activation tensor and then states its range. Memory does not grow with the data."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in a batch of any shape. Raises ValueError if it is empty or not finite."""

    @abstractmethod
    def compute(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both `()` and float32, on the device of the batches."""


class Range(ABC):
    """A choice of how to find scale and zero point; holds settings and no state."""

    @abstractmethod
    def fit(self, x: Tensor, grid: Grid, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a whole tensor.

        Args:
            x: any shape, finite.
            grid: the integers to use.
            channel_axis: axis with a scale of its own per index; None for one scale.

        Returns:
            Two float32 tensors of shape `()` or `(C,)`; the scale positive, the zero point an integer of the grid.

        Raises:
            ValueError: if `x` is empty or not finite.
        """

    @abstractmethod
    def observer(self, grid: Grid) -> Observer:
        """A fresh streaming estimator of the same range for a whole tensor."""

    def settle(self, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """What the quantizer takes of a scale and zero point, whoever chose them: here both as they are."""
        return scale, zero_point


class MinMax(Range):
    """The smallest and the largest value: nothing is clipped."""

    def fit(self, x: Tensor, grid: Grid, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
        """See `Range.fit`."""
        rows = _rows(x, channel_axis)
        return _shaped(from_bounds(rows.amin(1), rows.amax(1), grid), channel_axis)

    def observer(self, grid: Grid) -> Observer:
        """Running minimum and maximum; exact."""
        return _MinMaxObserver(grid)


class _MinMaxObserver(Observer):
    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.bounds: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        rows = _rows(x, None)
        low, high = rows.amin(1), rows.amax(1)
        if self.bounds is not None:
            low, high = torch.minimum(low, self.bounds[0]), torch.maximum(high, self.bounds[1])
        self.bounds = low, high

    def compute(self) -> tuple[Tensor, Tensor]:
        if self.bounds is None:
            raise ValueError("observer: expected at least one update before compute, got none")
        return _shaped(from_bounds(*self.bounds, self.grid), None)


class Percentile(Range):
    """Clips the same share of elements at each open end; on a symmetric grid the share is that of |x|.

    Args:
        percentile: per cent of the elements below the upper end, above 50 and at most 100.

    Raises:
        ValueError: if `percentile` is not.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile: expected above 50 and at most 100 per cent, got {percentile}")
        self.percentile = percentile

    def fit(self, x: Tensor, grid: Grid, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
        """See `Range.fit`; quantiles are interpolated linearly."""
        points = _rows(x, channel_axis)
        return _shaped(self.of_points(points, None, grid), channel_axis)

    def observer(self, grid: Grid) -> Observer:
        """Quantiles of a running histogram, exact to about one bin (see `_HistogramObserver`)."""
        return _HistogramObserver(self, grid)

    def of_points(self, points: Tensor, counts: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """Scale and zero point (C,) of values (C, K) that occur `counts` (K,) times each."""
        share = self.percentile / 100
        if grid.symmetric and grid.signed:
            high = _quantile(points.abs(), counts, share)
            return from_bounds(-high, high, grid)
        return from_bounds(_quantile(points, counts, 1 - share), _quantile(points, counts, share), grid)


class LpSearch(Range):
    """Shrinks the min-max range to the one with the least `mean |x - q(x)|^p`.

    With a fixed zero point all shrink factors are tried. With a free one, every eighth factor is tried with the zero
    point of min-max moved by 0, +-1, +-2, +-4 .. 2^(b-1) steps, and then all factors and zero points around the best.

    Args:
        p: exponent of the error.
        steps: number of shrink factors, evenly spaced from 1 down to, but not including, `smallest`.
        smallest: see `steps`.

    Raises:
        ValueError: if an argument is outside its domain.
    """

    STRIDE = 8  # of the coarse pass over shrink factors

    def __init__(self, p: float = 2.4, steps: int = 80, smallest: float = 0.2) -> None:
        if p <= 0:
            raise ValueError(f"p: expected a positive exponent, got {p}; 2 is the squared error, 2.4 the usual choice")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1 shrink factor, got {steps}")
        if not 0 < smallest <= 1:
            raise ValueError(f"smallest: expected a shrink factor in (0, 1], got {smallest}")
        self.p = p
        self.steps = steps
        self.smallest = smallest

    def fit(self, x: Tensor, grid: Grid, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
        """See `Range.fit`."""
        return _shaped(self.of_points(_rows(x, channel_axis), None, grid), channel_axis)

    def observer(self, grid: Grid) -> Observer:
        """The same search over the bins of a running histogram (see `_HistogramObserver`)."""
        return _HistogramObserver(self, grid)

    @torch.no_grad()
    def of_points(self, points: Tensor, counts: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """Scale and zero point (C,) of values (C, K) that occur `counts` (K,) times each."""
        scale, zero_point = from_bounds(points.amin(1), points.amax(1), grid)
        search = CandidateSearch(points, counts, grid, self.p, scale, zero_point)
        if grid.symmetric:
            for i in range(self.steps):
                search.offer(self._shrink(torch.full_like(scale, i)), zero_point, torch.full_like(scale, i))
        else:
            self._search_zero_point(search, scale, zero_point, grid)
        return search.scale, search.zero_point

    def _shrink(self, index: Tensor) -> Tensor:
        return 1 - (1 - self.smallest) * index / self.steps

    def _search_zero_point(self, search: CandidateSearch, scale: Tensor, zero_point: Tensor, grid: Grid) -> None:
        moves = [0, *(sign * 2**k for k in range(grid.bits) for sign in (1, -1))]
        for i in range(0, self.steps, self.STRIDE):
            index = torch.full_like(scale, i)
            for move in moves:
                search.offer(self._shrink(index), zero_point + move, index)
        best_index, best_zero_point = search.index.clone(), search.zero_point.clone()
        for i in range(1 - self.STRIDE, self.STRIDE):
            index = (best_index + i).clamp(0, self.steps - 1)
            for move in (-1, 0, 1):
                search.offer(self._shrink(index), best_zero_point + move, index)


class _HistogramObserver(Observer):
    """Percentile or Lp search on a running histogram.

    It keeps four bins for each integer of the grid and at least 8192, so that a bin is narrower than half a step of
    the min-max range at any width, a sixteenth of it at 8 bits and 1/270 at 4 bits (`RunningHistogram` has the bound).
    """

    def __init__(self, range: Percentile | LpSearch, grid: Grid) -> None:
        self.range, self.grid = range, grid
        self.histogram = RunningHistogram(max(8192, 2 ** (grid.bits + 2)))

    def update(self, x: Tensor) -> None:
        rows = _rows(x, None)
        self.histogram.update(rows, float(rows.amin()), float(rows.amax()))

    def compute(self) -> tuple[Tensor, Tensor]:
        points, counts = self.histogram.points()
        return _shaped(self.range.of_points(points.unsqueeze(0), counts, self.grid), None)


def _rows(x: Tensor, channel_axis: int | None) -> Tensor:
    """(C, K) float32; C is 1 without a channel axis."""
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one element to choose a range on, got shape {tuple(x.shape)}")
    x = x.detach().float()
    rows = x.reshape(1, -1) if channel_axis is None else x.movedim(channel_axis, 0).flatten(1)
    # The sum of the extremes is finite exactly if all elements are, which needs no mask of the size of x.
    if not bool(torch.isfinite(rows.amin() + rows.amax())):
        raise ValueError(
            f"x: expected finite values to choose a range on, got NaN or infinity in shape {tuple(x.shape)}; "
            "check the teacher's weights and the normalisation of the images"
        )
    return rows


def _shaped(bounds: tuple[Tensor, Tensor], channel_axis: int | None) -> tuple[Tensor, Tensor]:
    scale, zero_point = bounds
    return (scale.squeeze(0), zero_point.squeeze(0)) if channel_axis is None else (scale, zero_point)


def _quantile(points: Tensor, counts: Tensor | None, share: float) -> Tensor:
    """Quantile (C,) of values (C, K), interpolated between order statistics; torch.quantile stops at 2^24 elements."""
    ordered, order = points.sort(dim=1)
    last = (points.shape[1] if counts is None else int(counts.sum())) - 1
    lower = math.floor(share * last)
    ranks = torch.tensor([lower, min(lower + 1, last)], device=points.device).expand(len(points), 2)
    if counts is not None:
        ranks = torch.searchsorted(counts[order].cumsum(1), ranks.double().contiguous(), right=True)
    pair = ordered.gather(1, ranks)
    return torch.lerp(pair[:, 0], pair[:, 1], share * last - lower)
