"""Gradient inundation: an update of a weight is enlarged until enough of its integers change.

Choi et al., "It's All In the Teacher: Zero-Shot Quantization Brought Closer to the Teacher" (AIT), CVPR 2022, arXiv
2203.17008. Ours: what is enlarged is the whole update, weight decay included, which the released search leaves out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.base import Quantizer


class Inundation:
    """Multiplies an update by the least `a` >= 1, found by doubling and bisection, that moves enough integers.

    Args:
        share: of the integers of a tensor that have to change (0.001 for CIFAR in the released code).
        doublings: how often `a` is doubled at most; an update that does nothing even then stays as it is.
        bisections: how often the last doubling is halved.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(self, share: float = 0.001, *, doublings: int = 16, bisections: int = 8) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share: expected a share of the integers in (0, 1], got {share}")
        if doublings < 0 or bisections < 0:
            raise ValueError(f"doublings, bisections: expected >= 0, got {doublings} and {bisections}")
        self.share = share
        self.doublings = doublings
        self.bisections = bisections

    @torch.no_grad()
    def __call__(self, quantizer: Quantizer, weight: Tensor, before: Tensor) -> float:
        """Enlarge, in place, the update that took `weight` from `before` to what it is; return `a`.

        Args:
            quantizer: computes with `weight`, its own Parameter.
            weight: after the optimizer's step.
            before: the same before it.
        """
        update = weight - before
        weight.copy_(before)
        integers = quantizer.hard_multiples(weight)
        needed = self.share * weight.numel()

        def enough(factor: float) -> bool:
            weight.copy_(before + factor * update)
            return int((quantizer.hard_multiples(weight) != integers).sum()) >= needed

        low, high = 1.0, 1.0
        found = enough(high)
        for _ in range(self.doublings):
            if found:
                break
            low, high = high, 2 * high
            found = enough(high)
        if not found:
            weight.copy_(before + update)
            return 1.0
        for _ in range(self.bisections if high > 1 else 0):
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        weight.copy_(before + high * update)
        return high
