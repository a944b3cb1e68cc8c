"""Genie-M: AdaRound with a learned step, the lower neighbours frozen at the first step.

Jeon et al., "Genie: Show Me the Data for Quantization", CVPR 2023, arXiv 2212.04780, section 3.2. As in `adaround`,
weights outside the clip range are decided from the start and the regularizer is a mean.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantizers.affine import positive
from quantizers.base import Quantizer
from quantizers.grid import weight_grid
from quantizers.ranges import Range
from quantizers.soft_rounding import BetaSchedule, decide, rectified_sigmoid, split, undecided_penalty, undecided_share


class GenieM(Quantizer):
    """`s (floor(W / s0) + h(V))` with V and s learned, starting at the float weight.

    The integers of a weight do not move with s, so the two are learned without disturbing each other. The step stays
    positive by a clamp at 1e-12 through which the gradient passes. `forward` uses the floor kept by `initialize`, so
    its argument gives dtype and device only.

    Args:
        weight: (C, ...) the weight to quantize.
        bits: width, 2 to 16.
        channel_axis: axis with a step of its own per index; None for one step.
        symmetric: whether the zero point is fixed at 0.
        range: how the first step, and the zero point, are chosen.
        lr: learning rate of V.
        step_lr: learning rate of s.
        relative: multiply `step_lr` by the mean step of the layer, for weights far from unit size.
        warmup: share of the steps without regularizer.
        beta_start: exponent of the regularizer when it sets in.
        beta_end: its exponent at the last step.
        beta_schedule: how the exponent goes from one to the other, "linear" or "cosine".
    """

    base: Tensor  # lower neighbour of each weight, in steps from zero

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        *,
        channel_axis: int | None = 0,
        symmetric: bool = False,
        range: Range,
        lr: float = 1e-3,
        step_lr: float = 1e-4,
        relative: bool = False,
        warmup: float = 0.2,
        beta_start: float = 20.0,
        beta_end: float = 2.0,
        beta_schedule: Literal["linear", "cosine"] = "linear",
    ) -> None:
        grid = weight_grid(bits, symmetric=symmetric)
        super().__init__(grid, range, weight=weight, channel_axis=channel_axis, learn_scale=True)
        self.lr, self.step_lr, self.relative = lr, step_lr, relative
        self.beta = BetaSchedule(warmup=warmup, start=beta_start, end=beta_end, shape=beta_schedule)
        self.register_buffer("base", torch.zeros_like(weight, dtype=torch.float32))
        self.V = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.initialize(weight)

    def initialize_state(self, x: Tensor) -> None:
        """Keep the lower neighbours and start V at the float weight."""
        base, V = split(x, self.scale, self.zero_point, self.grid)
        self.base.copy_(base)
        self.V.copy_(V)

    def step(self) -> Tensor:
        """The learned step, kept positive."""
        return positive(self.scale)

    def multiples(self, x: Tensor) -> Tensor:
        """`floor(W / s0) + h(V)`, shape of the weight."""
        return self.base + rectified_sigmoid(self.V)

    def hard_multiples(self, x: Tensor) -> Tensor:
        """`floor(W / s0)` plus 0 or 1."""
        return self.base + (self.V >= 0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """V at `lr` and the step at `step_lr`."""
        step_lr = self.step_lr * self.step().mean().item() if self.relative else self.step_lr
        return [
            {"params": [self.V], "lr": self.lr, "anneal": "constant", "kind": "rounding"},
            {"params": [self.scale], "lr": step_lr, "anneal": "constant", "kind": "scale"},
        ]

    def regularizer(self, progress: float) -> Tensor:
        """`mean(1 - |2 h(V) - 1|^beta)`; zero during the warm-up."""
        return undecided_penalty(self.V, self.beta(progress))

    @torch.no_grad()
    def harden(self) -> None:
        """Write V far from zero, on the side it is on, and the positive step."""
        decide(self.V)
        self.scale.copy_(self.step())

    def soft_fraction(self) -> float:
        """Share of weights with `h(V)` strictly between 0 and 1."""
        return undecided_share(self.V)
