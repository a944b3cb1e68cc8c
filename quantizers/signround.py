"""SignRound: learns, with the signs of gradients only, by how much each weight moves before it is rounded.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv 2309.05516,
eq. 3-5. The learned ends of the clip range are multipliers of those that `range` chooses; on a symmetric grid they
share one. We deviate in two places. The multipliers end at 1e-3 instead of 0, where the scale would be zero. The values
of the last step are kept, since the rates fall to zero, not those of the step whose batch had the least loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantizers.affine import between, positive, round_straight_through, rounded_positions
from quantizers.base import Quantizer
from quantizers.grid import weight_grid
from quantizers.ranges import Range

SHIFT = (-0.5, 0.5)
CLIP = (1e-3, 1.0)
# Adam that forgets at once divides a gradient by its own magnitude, which leaves its sign. The square of a gradient
# below 1e-19 is zero or subnormal in float32; eps keeps the step of such a gradient below that of a sign.
SIGN_SGD = {"betas": (0.0, 0.0), "eps": 1e-15}


class SignRound(Quantizer):
    """`s (clip(round(W / s + V) + z) - z)` with V and the clip range learned; at the first step rounding to nearest.

    With `low` and `high` the ends of the range, `s = (alpha high - beta low) / levels` and `z` is where zero then lies,
    rounded. The gradient passes rounding unchanged. The groups ask for the projection of V onto [-0.5, 0.5]; without
    it, `forward` clips.

    Args:
        weight: (C, ...) the weight to quantize.
        bits: width, 2 to 16.
        channel_axis: axis with a scale of its own per index; None for one scale.
        symmetric: whether the zero point is fixed at 0.
        range: how the first scale and zero point are chosen.
        lr: learning rate of V times the number of steps: falling linearly, V can go half as far in all.
        clip_lr: learning rate of alpha and beta times the number of steps.
        learn_clip: whether they are learned.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        *,
        channel_axis: int | None = 0,
        symmetric: bool = False,
        range: Range,
        lr: float = 1.0,
        clip_lr: float = 1.0,
        learn_clip: bool = True,
    ) -> None:
        super().__init__(weight_grid(bits, symmetric=symmetric), range, weight=weight, channel_axis=channel_axis)
        self.lr, self.clip_lr = lr, clip_lr
        self.V = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.alpha = nn.Parameter(torch.ones_like(self.scale), requires_grad=learn_clip)
        two_ends = learn_clip and not symmetric
        self.beta = nn.Parameter(torch.ones_like(self.scale), requires_grad=two_ends) if not symmetric else None
        self.initialize(weight)

    def initialize_state(self, x: Tensor) -> None:
        """Start with the range as chosen and no shift."""
        self.V.zero_()
        self._reset_clip()

    def _reset_clip(self) -> None:
        self.alpha.fill_(1.0)
        if self.beta is not None:
            self.beta.fill_(1.0)

    def step(self) -> Tensor:
        """The scale that the learned range has, kept positive."""
        return positive(self.scale * self._width())

    def offset(self) -> Tensor:
        """The zero point that the learned range has."""
        if self.beta is None:
            return self.zero_point
        below = between(self.beta, *CLIP) * (self.zero_point - self.grid.low)
        return round_straight_through(self.grid.low + below / self._width())

    def _width(self) -> Tensor:
        """The learned range as a share of the chosen one; exactly 1 while alpha and beta are."""
        alpha = between(self.alpha, *CLIP)
        if self.beta is None:
            return alpha
        above, below = self.grid.high - self.zero_point, self.zero_point - self.grid.low
        return (alpha * above + between(self.beta, *CLIP) * below) / (self.grid.high - self.grid.low)

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z`, shape of `x`."""
        return rounded_positions(x / self.step() + between(self.V, *SHIFT), self.offset(), self.grid)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """V at `lr`, alpha and beta at `clip_lr`, for signed gradients and projected."""
        sign_sgd = {"anneal": "linear", "over_steps": True, **SIGN_SGD}
        groups = [{"params": [self.V], "lr": self.lr, "kind": "rounding", "bounds": SHIFT, **sign_sgd}]
        ends = [p for p in (self.alpha, self.beta) if p is not None and p.requires_grad]
        if ends:
            groups.append({"params": ends, "lr": self.clip_lr, "kind": "scale", "bounds": CLIP, **sign_sgd})
        return groups

    @torch.no_grad()
    def harden(self) -> None:
        """Write scale and zero point of the learned range; the same forward gives the same numbers."""
        scale, zero_point = self.step(), self.offset()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._reset_clip()
