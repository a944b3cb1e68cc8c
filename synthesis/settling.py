"""When a synthesis has stopped getting better."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LEAST_GAIN = 0.01  # share of the lowest loss by which a lower one counts as progress


class Settling(nn.Module):
    """Says that a loss has not fallen by a hundredth for so many steps; a checkpoint carries what it has seen.

    Args:
        patience: steps without progress; None: it never settles.
    """

    lowest: Tensor

    def __init__(self, patience: int | None) -> None:
        super().__init__()
        if patience is not None and patience < 1:
            raise ValueError(f"early_stop: expected a positive number of steps, or null for never, got {patience}")
        self.patience = patience
        self.register_buffer("lowest", torch.tensor([math.inf, 0.0], dtype=torch.float64))  # a loss, and its step

    def forget(self) -> None:
        """Start anew."""
        self.lowest.copy_(torch.tensor([math.inf, 0.0], dtype=torch.float64))

    def settled(self, step: int, loss: float) -> bool:
        """Take in the loss at `step`; return whether the patience is at its end."""
        if self.patience is None:
            return False
        lowest, since = self.lowest.tolist()
        if lowest == math.inf or loss < lowest - LEAST_GAIN * abs(lowest):
            self.lowest.copy_(torch.tensor([loss, step], dtype=torch.float64))
            return False
        return step - since >= self.patience
