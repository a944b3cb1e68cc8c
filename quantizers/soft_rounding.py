"""Soft roundings by a rectified sigmoid, and the regularizer that drives them to 0 or 1.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, arXiv 2004.10568, eq. 22-24.
The base differs from the paper's floor(W / s) only for weights outside the clip range: there both roundings give the
end of the grid, so the decision is taken at once. In the paper's form such a weight has no gradient from the error
but pays the regularizer to the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantizers.grid import Grid

ZETA, GAMMA = 1.1, -0.1
DECIDED = 10.0  # h(10) = 1 and h(-10) = 0 exactly, with no gradient through the rectifier


@dataclass(frozen=True, kw_only=True)
class BetaSchedule:
    """Exponent of the regularizer: none before `warmup`, then from `start` to `end`, both shares of the progress.

    Raises:
        ValueError: if `warmup` is outside [0, 1), an exponent is below 1, or `shape` is unknown.
    """

    warmup: float = 0.2
    start: float = 20.0
    end: float = 2.0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share of the steps in [0, 1), got {self.warmup}")
        if min(self.start, self.end) < 1:
            raise ValueError(f"beta_start, beta_end: expected at least 1, got {self.start} and {self.end}")
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"beta_schedule: expected 'linear' or 'cosine', got {self.shape!r}")

    def __call__(self, progress: float) -> float | None:
        """The exponent at `progress` in [0, 1]; None while there is no regularizer."""
        if progress < self.warmup:
            return None
        done = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.end + (self.start - self.end) * left


def rectified_sigmoid(V: Tensor) -> Tensor:
    """`h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)`, shape of `V`."""
    return (torch.sigmoid(V) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def split(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Lower neighbour `B` on the grid (as a multiple of the step) and `V` with `(B + h(V)) s = x` inside the range.

    `B` and `B + 1` are both on the grid. Outside the range, V is decided for the nearer end.
    """
    position = x / scale
    lowest, highest = grid.low - zero_point, grid.high - zero_point
    base = torch.clamp(position.floor(), lowest, highest - 1)
    V = -torch.log((ZETA - GAMMA) / ((position - base).clamp(0.0, 1.0) - GAMMA) - 1)
    V = torch.where(position > highest, DECIDED, V)
    return base, torch.where(position < lowest, -DECIDED, V)


def undecided_penalty(V: Tensor, beta: float | None) -> Tensor:
    """`mean(1 - |2 h(V) - 1|^beta)`, a scalar; zero if `beta` is None."""
    if beta is None:
        return V.new_zeros(())
    return (1 - (2 * rectified_sigmoid(V) - 1).abs().pow(beta)).mean()


def undecided_share(V: Tensor) -> float:
    """Share of elements with `h(V)` strictly between 0 and 1."""
    h = rectified_sigmoid(V.detach())
    return float(((h > 0) & (h < 1)).float().mean())


@torch.no_grad()
def decide(V: Tensor) -> None:
    """Round every `h(V)` in place, up from one half."""
    V.copy_(torch.where(V >= 0, DECIDED, -DECIDED))
