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


class Norm(Criterion):
    """l = ||[|m - mu| - d_mu]_+||_2 + ||[|s - sigma| - d_sigma]_+||_2, the norms not squared.

    Yin et al., "Dreaming to Distill" (DeepInversion), CVPR 2020, arXiv 1912.08795. Its gradient does not vanish near
    the target.
    """

    def __call__(self, seen: Statistics, target: Statistics, slack: Statistics, segments: Tensor) -> Tensor:
        mean = _beyond(seen.mean - target.mean, slack.mean).square() @ segments
        spread = _beyond(seen.spread - target.spread, slack.spread).square() @ segments
        return _root(mean) + _root(spread)


class NormalizedDistance(Criterion):
    """L_Z = || (m - mu) / sqrt((s + eps)^2 + (sigma + eps)^2) ||_2: only means are drawn together.

    Sharma, Abraham, Rajendiran, "A Generalized Zero-Shot Quantization of Deep Convolutional Neural Networks via Learned
    Weights Statistics" (GZSQ), IEEE TMM 2021, arXiv 2112.02834. The division is done channel by channel, inside
    the norm.

    Args:
        eps: added to both standard deviations.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        if eps <= 0:
            raise ValueError(f"criterion.eps: expected a positive number, got {eps}")
        self.eps = eps

    def __call__(self, seen: Statistics, target: Statistics, slack: Statistics, segments: Tensor) -> Tensor:
        scale = (seen.spread + self.eps).square() + (target.spread + self.eps).square()
        return _root((_beyond(seen.mean - target.mean, slack.mean).square() / scale) @ segments)


class NormalDivergence(Criterion):
    """KL(N(m, s^2) || N(mu, sigma^2)), summed over the channels of a layer; slack is not used.

    Haroush et al., "The Knowledge Within", CVPR 2020, arXiv 1912.01274.

    Args:
        channels: "sum" or "mean" over the channels of a layer.
    """

    def __init__(self, channels: Literal["sum", "mean"] = "sum") -> None:
        if channels not in ("sum", "mean"):
            raise ValueError(f"channels: expected 'sum' or 'mean', got {channels!r}")
        self.channels = channels

    def __call__(self, seen: Statistics, target: Statistics, slack: Statistics, segments: Tensor) -> Tensor:
        small = torch.finfo(seen.spread.dtype).tiny ** 0.25
        s, sigma = seen.spread.clamp_min(small), target.spread.clamp_min(small)
        divergence = (sigma / s).log() + (s.square() + (seen.mean - target.mean).square()) / (2 * sigma.square()) - 0.5
        losses = divergence @ segments
        return losses if self.channels == "sum" else losses / segments.sum(0)


def _root(x: Tensor) -> Tensor:
    """The square root, with gradient zero at zero."""
    return torch.where(x > 0, x, 1.0).sqrt() * (x > 0)


def _beyond(gap: Tensor, slack: Tensor) -> Tensor:
    return (gap.abs() - slack).clamp_min(0)


class LayerWeights(ABC):
    """How much each layer counts, possibly for each sample."""

    @abstractmethod
    def __call__(self, samples: int, layers: int, reduction: Reduction, device: torch.device) -> Tensor:
        """Return weights (1, L) or (N, L)."""


class Uniform(LayerWeights):
    """Every layer counts the same: `weight` ("sum") or `weight` / L ("mean")."""

    def __init__(self, layers: Literal["sum", "mean"] = "sum", *, weight: float = 1.0) -> None:
        if layers not in ("sum", "mean"):
            raise ValueError(f"layers: expected 'sum' or 'mean', got {layers!r}")
        self.layers = layers
        self.weight = weight

    def __call__(self, samples: int, layers: int, reduction: Reduction, device: torch.device) -> Tensor:
        return torch.full((1, layers), self.weight * (1.0 if self.layers == "sum" else 1 / layers), device=device)


class LayerwiseEnhancement(LayerWeights):
    """LSE of DSG (arXiv 2103.01049, section 3.3): X = Id + 1 1^T, so sample i counts layer i twice.

    Raises:
        ValueError: when called with pooled statistics, or unless there are as many samples as layers.
    """

    def __call__(self, samples: int, layers: int, reduction: Reduction, device: torch.device) -> Tensor:
        if reduction != "sample":
            raise ValueError(
                f"reduction: layer-wise enhancement expects 'sample', got {reduction!r}; pooled statistics do not "
                "say which sample they come from. Set generator.probe.reduction=sample or take uniform layer weights "
                "(DSG: generator.lse=false)"
            )
        if samples != layers:
            raise ValueError(
                f"batch_size: layer-wise enhancement expects one sample for each BatchNorm layer ({layers}), got "
                f"{samples}. Set generator.batch_size=null (the number of BatchNorm layers) or take uniform layer "
                "weights (DSG: generator.lse=false)"
            )
        return 1 + torch.eye(layers, device=device)


class FirstLayer(LayerWeights):
    """The first layer counts `factor` times `weight`, each other one `weight` (DeepInversion: 10 and its r)."""

    def __init__(self, factor: float = 10.0, *, weight: float = 1.0) -> None:
        self.factor = factor
        self.weight = weight

    def __call__(self, samples: int, layers: int, reduction: Reduction, device: torch.device) -> Tensor:
        weights = torch.full((1, layers), self.weight, device=device)
        weights[0, 0] *= self.factor
        return weights
