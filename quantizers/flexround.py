"""FlexRound: learns what each weight is divided by before it is rounded.

Lee et al., "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization", ICML 2023,
arXiv 2306.00317, eq. 2. The divisors are exponentials, hence positive. For a convolution the paper multiplies a divisor
per output and one per input channel, for a linear layer one per output channel; so do we. The rate is annealed, because
at a constant one the roundings near a threshold keep flipping to the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantizers.affine import multiples
from quantizers.base import Quantizer
from quantizers.grid import weight_grid
from quantizers.ranges import Range


class FlexRound(Quantizer):
    """`s1 * (clip(round(W / (s1 S2 s3 s4)) + z) - z)` with all divisors learned; at the first step rounding to nearest.

    `s1 = scale * exp(log_s1)`, and S2, s3, s4 likewise, all logarithms starting at zero. `harden` folds `log_s1` into
    `scale`. The gradient of a divisor grows with the weight, so large weights move most, as the paper intends.

    Args:
        weight: (C, ...) the weight to quantize.
        bits: width, 2 to 16.
        channel_axis: axis of the output channels, with a scale of its own per index; None for one scale.
        symmetric: whether the zero point is fixed at 0.
        range: how the first scale, and the zero point, are chosen.
        lr: learning rate of all logarithms.
        learn_scale: whether s1 is learned.
        stated_for: steps that the rate is meant for; None: as many as the reconstruction says.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        *,
        channel_axis: int | None = 0,
        symmetric: bool = False,
        range: Range,
        lr: float = 3e-3,
        learn_scale: bool = True,
        stated_for: int | None = None,
    ) -> None:
        super().__init__(weight_grid(bits, symmetric=symmetric), range, weight=weight, channel_axis=channel_axis)
        self.lr, self.stated_for = lr, stated_for
        out_axis = 0 if channel_axis is None else channel_axis % weight.dim()
        self.log_s1 = nn.Parameter(torch.zeros_like(self.scale), requires_grad=learn_scale)
        self.log_S2 = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.log_s3 = nn.Parameter(self._ones_but(weight, out_axis))
        convolution = weight.dim() > 2
        self.log_s4 = nn.Parameter(self._ones_but(weight, 1 - out_axis)) if convolution else None
        self.initialize(weight)

    @staticmethod
    def _ones_but(weight: Tensor, axis: int) -> Tensor:
        """Zeros of size 1 along all axes but one."""
        shape = [size if i == axis else 1 for i, size in enumerate(weight.shape)]
        return torch.zeros(shape, device=weight.device)

    def initialize_state(self, x: Tensor) -> None:
        """Start all divisors at 1."""
        for parameter in self.parameters():
            parameter.zero_()

    def step(self) -> Tensor:
        """The learned grid step s1."""
        return self.scale * self.log_s1.exp()

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z`, shape of `x`."""
        logarithm = self.log_S2 + self.log_s3
        if self.log_s4 is not None:
            logarithm = logarithm + self.log_s4
        return multiples(x, self.step() * logarithm.exp(), self.zero_point, self.grid)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The divisors S2, s3, s4 and the step s1, all at `lr`."""
        divisors = [p for p in (self.log_S2, self.log_s3, self.log_s4) if p is not None]
        rate = {"lr": self.lr, "anneal": "cosine", "stated_for": self.stated_for}
        groups = [{"params": divisors, "kind": "rounding"} | rate]
        if self.log_s1.requires_grad:
            groups.append({"params": [self.log_s1], "kind": "scale"} | rate)
        return groups

    @torch.no_grad()
    def harden(self) -> None:
        """Fold the learned step into `scale`; the same forward gives the same numbers."""
        self.scale.copy_(self.step())
        self.log_s1.zero_()
