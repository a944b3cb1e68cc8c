"""How far seen statistics are from their targets, and how much each layer counts.

All layers lie side by side in one (rows, sum of C) tensor, so a criterion costs a handful of kernels, not a handful
for each layer. Scale matters: published codes differ silently between sums and means over channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from synthesis.moments import Reduction, Statistics


class Criterion(ABC):
    """A distance between statistics, per layer."""

    @abstractmethod
    def __call__(self, seen: Statistics, target: Statistics, slack: Statistics, segments: Tensor) -> Tensor:
        """Return the loss of each layer, (rows, L).

        Args:
            seen: (rows, sum of C); a row a sample, or one row for a batch.
            target: (sum of C,).
            slack: (sum of C,); gaps up to it cost nothing.
            segments: (sum of C, L), 1 where a channel belongs to a layer.
        """


class SquaredL2(Criterion):
    """l = ||[|m - mu| - d_mu]_+||^2 + ||[|s - sigma| - d_sigma]_+||^2 (ZeroQ, DSG).

    Args:
        channels: "sum" (the norm as written) or "mean" over the channels of a layer.
    """

    def __init__(self, channels: Literal["sum", "mean"] = "sum") -> None:
        if channels not in ("sum", "mean"):
            raise ValueError(f"channels: expected 'sum' or 'mean', got {channels!r}")
        self.channels = channels

    def __call__(self, seen: Statistics, target: Statistics, slack: Statistics, segments: Tensor) -> Tensor:
        mean = _beyond(seen.mean - target.mean, slack.mean).square()
        spread = _beyond(seen.spread - target.spread, slack.spread).square()
        losses = (mean + spread) @ segments
        return losses if self.channels == "sum" else losses / segments.sum(0)


def _beyond(gap: Tensor, slack: Tensor) -> Tensor:
    return (gap.abs() - slack).clamp_min(0)


class LayerWeights(ABC):
    """How much each layer counts, possibly for each sample."""

    @abstractmethod
    def __call__(self, samples: int, layers: int, reduction: Reduction, device: torch.device) -> Tensor:
        """Return weights (1, L) or (N, L)."""


class Uniform(LayerWeights):
    """Every layer counts the same: 1 ("sum") or 1/L ("mean")."""

    def __init__(self, layers: Literal["sum", "mean"] = "sum") -> None:
        if layers not in ("sum", "mean"):
            raise ValueError(f"layers: expected 'sum' or 'mean', got {layers!r}")
        self.layers = layers

    def __call__(self, samples: int, layers: int, reduction: Reduction, device: torch.device) -> Tensor:
        return torch.full((1, layers), 1.0 if self.layers == "sum" else 1 / layers, device=device)


class LayerwiseEnhancement(LayerWeights):
    """LSE of DSG (arXiv 2103.01049, section 3.3): X = Id + 1 1^T, so sample i counts layer i twice.

    Raises:
        ValueError: when called with pooled statistics, or unless there are as many samples as layers.
    """

    def __call__(self, samples: int, layers: int, reduction: Reduction, device: torch.device) -> Tensor:
        if reduction != "sample":
            raise ValueError(
                f"reduction: layer-wise enhancement expects 'sample', got {reduction!r}; pooled statistics do not say "
                "which sample they come from. Set probe.reduction=sample or use uniform layer weights"
            )
        if samples != layers:
            raise ValueError(
                f"batch_size: layer-wise enhancement expects one sample for each BatchNorm layer ({layers}), got "
                f"{samples}. Set batch_size=null (the number of BatchNorm layers) or use uniform layer weights"
            )
        return 1 + torch.eye(layers, device=device)
