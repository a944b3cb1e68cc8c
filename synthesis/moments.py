"""Mean and variance of feature maps, per sample or pooled, with a cheap gradient.

All reductions rest on one primitive, the biased moments of every single map. Pooled moments follow from them by the
law of total variance, Var = E[var] + Var[mean], which is exact and stable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reduction = Literal["sample", "batch", "all"]
Moment = Literal["std", "var"]


class Moments(NamedTuple):
    """Mean and variance per channel: (C,), or (N, C) per sample."""

    mean: Tensor
    var: Tensor


class Statistics(NamedTuple):
    """Mean and spread per channel; the spread is a standard deviation or a variance, as the `Probe` says."""

    mean: Tensor
    spread: Tensor


class _MapMoments(torch.autograd.Function):
    """Biased mean and variance over all axes but the first two.

    d mean / dx = 1/P and d var / dx = 2 (x - mean) / P, so the gradient is one affine map b x + a per feature map.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # (N, C, *) -> (N, C), (N, C)
        axes = tuple(range(2, x.dim()))
        if x.device.type == "cpu":
            # Two passes: on a CPU `torch.var_mean` takes about ten times as long. The squares of the centred
            # values, not E[x^2] - mean^2, because float32 loses the variance of a channel far from zero.
            mean = x.mean(axes, keepdim=True)
            var = torch.linalg.vector_norm(x - mean, dim=axes).square() / x[0, 0].numel()
            mean = mean.flatten(1)
        else:
            var, mean = torch.var_mean(x, axes, correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        grad_mean, grad_var = gradients
        count = x[0, 0].numel()
        slope = grad_var * (2 / count)
        offset = grad_mean / count - slope * mean
        shape = (*mean.shape, *(1,) * (x.dim() - 2))
        return (x * slope.view(shape)).add_(offset.view(shape))


def raised(x: Tensor) -> Tensor:
    """Return half precision as float32, everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exactly(x: Tensor) -> torch.autocast:
    """Return a context for sums of squares and what else half precision would spoil: no autocast on x's device."""
    return torch.autocast(x.device.type, enabled=False)


def side_by_side(parts: Sequence[Moments]) -> Moments:
    """Return the moments of several layers as one row a sample, or one row for a batch: (rows, sum of C)."""
    return Moments(*(torch.atleast_2d(torch.cat(column, -1)) for column in zip(*parts, strict=True)))


def moments(x: Tensor, reduction: Reduction = "batch", unbiased: bool = False) -> Moments:
    """Return the moments of `x`, always finite for finite `x`.

    Args:
        x: feature maps (N, C, *) or features (N, C); half precision is raised to float32.
        reduction: "sample" over the positions of each map -> (N, C); "batch" and "all" over samples and positions
            -> (C,). For "all" the caller merges the batches (see `merge`).
        unbiased: divide by n - 1. A single observation has variance 0 (not NaN).
    """
    x = raised(x)
    if x.dim() == 2:
        x = x.unsqueeze(-1)
    mean, var = _MapMoments.apply(x)  # type: ignore[misc]
    count = x[0, 0].numel()
    if reduction != "sample":
        pooled = mean.mean(0)
        var = var.mean(0) + (mean - pooled).square().mean(0)
        mean, count = pooled, count * len(x)
    if unbiased:
        var = var * (count / max(count - 1, 1))
    return Moments(mean, var)


def merge(parts: Sequence[Moments], counts: Sequence[float | Tensor]) -> Moments:
    """Pool moments of disjoint sets: Var = E[var] + Var[mean], each set weighted by its number of observations.

    A set with count 0 does not contribute. Exact for biased variances.
    """
    total = sum(counts)
    weights = [count / total for count in counts]
    mean = sum((w * part.mean for w, part in zip(weights, parts, strict=True)), start=torch.zeros(()))
    spread = [part.var + (part.mean - mean).square() for part in parts]
    var = sum((w * part for w, part in zip(weights, spread, strict=True)), start=torch.zeros(()))
    return Moments(mean, var)


@dataclass(frozen=True)
class Probe:
    """How moments are taken; the loss and everything that calibrates it (slack) share one probe.

    Args:
        reduction: "sample", "batch" or "all" (the present batch merged with the finished ones).
        unbiased: whether variances divide by n - 1; not with "all".
        moment: compare standard deviations or variances.
        eps: added to the variance inside the root, so that its gradient stays finite.
    """

    reduction: Reduction = "batch"
    unbiased: bool = False
    moment: Moment = "std"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.reduction not in ("sample", "batch", "all"):
            raise ValueError(f"reduction: expected 'sample', 'batch' or 'all', got {self.reduction!r}")
        if self.moment not in ("std", "var"):
            raise ValueError(f"moment: expected 'std' or 'var', got {self.moment!r}")
        if self.eps <= 0:
            raise ValueError(f"eps: expected a positive number, got {self.eps}; a dead channel needs it to stay finite")
        if self.reduction == "all" and self.unbiased:
            raise ValueError(
                "unbiased: expected False with reduction 'all', got True; merged variances are exact only when biased"
            )

    def measure(self, x: Tensor) -> Moments:
        """Return the moments of feature maps `x`: (N, C) for "sample", else (C,)."""
        return moments(x, self.reduction, self.unbiased)

    def statistics(self, seen: Moments) -> Statistics:
        """Return the mean and the spread that criteria compare."""
        return Statistics(seen.mean, (seen.var + self.eps).sqrt() if self.moment == "std" else seen.var)
