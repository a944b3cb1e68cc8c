"""Activation ranges that follow a network in training: moving averages of the batches' smallest and largest values.

Xu et al., "Generative Low-bitwidth Data Free Quantization" (GDFQ), ECCV 2020, arXiv 2003.03603. The released codes of
that line divide the average by 1 - decay^t at every step and go on from the quotient, so that a constant of 1 reads
1103 after ten steps. Here the weights of all batches are averaged alongside and divided by once, on reading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.affine import from_bounds, multiples
from quantizers.base import Quantizer
from quantizers.grid import activation_grid
from quantizers.ranges import Range


class MovingAverage(Quantizer):
    """Rounds an activation to nearest; while `observing`, each batch moves the range first.

    Attributes:
        observing: whether `forward` takes its batch into the averages; off but while a fine-tuning asks for it. What
            was calibrated before does not count in them.

    Args:
        bits: width, 2 to 16.
        signed: whether the operator before it can produce negative numbers.
        symmetric: for signed activations, whether the zero point is fixed at 0.
        range: how scale and zero point are chosen before anything is observed.
        decay: of the averages, in [0, 1).

    Raises:
        ValueError: if `decay` is outside its domain.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, bits: int, *, signed: bool, symmetric: bool = False, range: Range, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a share in [0, 1), got {decay}; 0.9 is the usual choice")
        super().__init__(activation_grid(bits, signed=signed, symmetric=symmetric), range)
        self.decay = decay
        self.observing = False
        for name in ("low", "high", "seen"):  # the averages, not yet corrected, and what they are to be divided by
            self.register_buffer(name, torch.zeros(()))

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z`, shape of `x`."""
        return multiples(x, self.scale, self.zero_point, self.grid)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See `Quantizer`; moves the range while `observing`."""
        if self.observing:
            self.observe(x)
        return super().fake_quantize(x)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take a batch of any shape into the averages, and set the range to what they are now."""
        for average, value in ((self.low, x.min()), (self.high, x.max()), (self.seen, 1.0)):
            average.mul_(self.decay).add_((1 - self.decay) * value)
        low, high = self.bounds()
        scale, zero_point = from_bounds(low.unsqueeze(0), high.unsqueeze(0), self.grid)
        self.scale.copy_(scale.squeeze(0))
        self.zero_point.copy_(zero_point.squeeze(0))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The averaged smallest and largest value, each `()`; NaN before the first batch."""
        return self.low / self.seen, self.high / self.seen
