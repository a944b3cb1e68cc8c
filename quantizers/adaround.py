"""AdaRound: learns for every weight whether to round up or down.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, arXiv 2004.10568.
We deviate in two places. Weights outside the clip range are decided from the start (see `soft_rounding`), and the
regularizer is a mean over the weights instead of a sum, so that its factor does not depend on the size of the layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantizers.base import Quantizer
from quantizers.grid import weight_grid
from quantizers.ranges import Range
from quantizers.soft_rounding import BetaSchedule, decide, rectified_sigmoid, split, undecided_penalty, undecided_share


class AdaRound(Quantizer):
    """`s (floor(W / s) + h(V))` with V learned, starting at the float weight.

    `forward` uses the floor kept by `initialize`, so its argument gives dtype and device only.

    Args:
        weight: (C, ...) the weight to quantize.
        bits: width, 2 to 16.
        channel_axis: axis with a scale of its own per index; None for one scale.
        symmetric: whether the zero point is fixed at 0.
        range: how scale and zero point are chosen; they stay fixed.
        lr: learning rate of V.
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
        warmup: float = 0.2,
        beta_start: float = 20.0,
        beta_end: float = 2.0,
        beta_schedule: Literal["linear", "cosine"] = "linear",
    ) -> None:
        super().__init__(weight_grid(bits, symmetric=symmetric), range, weight=weight, channel_axis=channel_axis)
        self.lr = lr
        self.beta = BetaSchedule(warmup=warmup, start=beta_start, end=beta_end, shape=beta_schedule)
        self.register_buffer("base", torch.zeros_like(weight, dtype=torch.float32))
        self.V = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.initialize(weight)

    def initialize_state(self, x: Tensor) -> None:
        """Keep the lower neighbours and start V at the float weight."""
        base, V = split(x, self.scale, self.zero_point, self.grid)
        self.base.copy_(base)
        self.V.copy_(V)

    def multiples(self, x: Tensor) -> Tensor:
        """`floor(W / s) + h(V)`, shape of the weight."""
        return self.base + rectified_sigmoid(self.V)

    def hard_multiples(self, x: Tensor) -> Tensor:
        """`floor(W / s)` plus 0 or 1."""
        return self.base + (self.V >= 0)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """V at `lr`."""
        return [{"params": [self.V], "lr": self.lr, "anneal": "constant", "kind": "rounding"}]

    def regularizer(self, progress: float) -> Tensor:
        """`mean(1 - |2 h(V) - 1|^beta)`; zero during the warm-up."""
        return undecided_penalty(self.V, self.beta(progress))

    def harden(self) -> None:
        """Write V far from zero, on the side it is on: the same forward then gives exactly 0 or 1."""
        decide(self.V)

    def soft_fraction(self) -> float:
        """Share of weights with `h(V)` strictly between 0 and 1."""
        return undecided_share(self.V)
