"""How alike synthetic images are: their statistics around the stored ones, and each other.

After Zhang et al., "Diversifying Sample Generation for Accurate Data-Free Quantization" (DSG), CVPR 2021, arXiv
2103.01049, section 3.1: images fitted to BatchNorm statistics are homogeneous at the level of the distribution (all
samples' statistics crowd around the stored ones) and of the sample (they resemble each other). The paper shows
figures; the numbers here are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from synthesis.moments import Moments


class LayerDiversity(NamedTuple):
    """Of one layer, over all samples of a set.

    Attributes:
        mean_spread: root mean square of (m - mu) / sigma over samples and channels.
        std_spread: the same of (s - sigma) / sigma.
        similarity: mean cosine between two different samples' vectors of (m - mu) / sigma and (s - sigma) / sigma.
    """

    mean_spread: float
    std_spread: float
    similarity: float


class Diversity:
    """Accumulates, batch by batch, what `compute` tells of a whole set; keeps no images.

    Args:
        target: stored moments of all layers side by side, (sum of C,).
        sizes: channels of each layer.
        eps: added to variances inside roots.
    """

    def __init__(self, target: Moments, sizes: list[int], eps: float = 1e-6) -> None:
        self.target = target
        self.sizes = sizes
        self.eps = eps
        self.count = 0
        self.squares = torch.zeros(2, len(sizes), dtype=torch.float64)
        self.directions = [torch.zeros(2 * size, dtype=torch.float64) for size in sizes]
        self.feature_direction: Tensor | None = None
        self.cloud: list[Moments] = []

    @torch.no_grad()
    def update(self, seen: Moments, features: Tensor | None = None) -> None:
        """Take in the per-sample moments of a batch, (N, sum of C), and its features, (N, F)."""
        sigma = (self.target.var + self.eps).sqrt()
        mean = ((seen.mean - self.target.mean) / sigma).double().cpu()
        std = (((seen.var + self.eps).sqrt() - sigma) / sigma).double().cpu()
        self.count += len(mean)
        for index, (m, s) in enumerate(zip(mean.split(self.sizes, 1), std.split(self.sizes, 1), strict=True)):
            self.squares[0, index] += m.square().mean(1).sum()
            self.squares[1, index] += s.square().mean(1).sum()
            self.directions[index] += F.normalize(torch.cat([m, s], 1), dim=1).sum(0)
        self.cloud.append(Moments(mean.mean(1).float(), std.mean(1).float()))
        if features is not None:
            direction = F.normalize(features.double().cpu(), dim=1).sum(0)
            self.feature_direction = direction if self.feature_direction is None else self.feature_direction + direction

    def compute(self) -> list[LayerDiversity]:
        """Return a row for each layer."""
        spread = (self.squares / self.count).sqrt()
        return [
            LayerDiversity(float(spread[0, i]), float(spread[1, i]), self._similarity(direction))
            for i, direction in enumerate(self.directions)
        ]

    def feature_similarity(self) -> float:
        """Return the mean cosine between two different samples' features; NaN where none were given."""
        return float("nan") if self.feature_direction is None else self._similarity(self.feature_direction)

    def _similarity(self, direction: Tensor) -> float:
        # |sum of unit vectors|^2 holds every pair twice, and every vector once with itself
        pairs = self.count * (self.count - 1)
        return float((direction.square().sum() - self.count) / pairs) if pairs else float("nan")
