"""The stages of a synthesis, for instance coarse images and then fine ones, in proportion to its steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


class Stages:
    """Stages whose lengths keep their proportions whatever the number of steps.

    Args:
        shares: length of each stage. Published numbers of steps say best what they mean, and until `plan` is called
            they are the lengths themselves.

    Raises:
        ValueError: if there are none, or one is not positive.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        if not shares or min(shares) < 1:
            raise ValueError(f"shares: expected a positive number of steps for each stage, got {list(shares)}")
        self.shares = list(shares)
        self.plan(sum(shares))

    def plan(self, steps: int) -> None:
        """Divide `steps` among the stages; ends are rounded down, so that the last stage is never left out."""
        self.ends = [steps * part // sum(self.shares) for part in accumulate(self.shares)]
        self.starts = [0, *self.ends[:-1]]

    def scaled(self, steps: int) -> int:
        """Return what `steps` out of the sum of `shares` become."""
        return steps * self.ends[-1] // sum(self.shares)

    def index(self, step: int) -> int:
        """Return the stage that `step` belongs to; the number of stages for what lies behind the last."""
        return bisect_right(self.ends, step)
