"""What an allocation spends and what it harms: numbers for every group and choice, and the amount of an assignment.

Sensitivity is a resource like the others, so that any of them can be minimized under budgets for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Row = tuple[Values, ...]  # for each group one number a choice


class Border(NamedTuple):
    """Group `before` makes a tensor that group `behind` reads: `cost` is due where their activation widths differ."""

    before: int
    behind: int
    cost: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Resource:
    """Amounts by group and choice.

    Attributes:
        rows: the amount of an assignment is the largest sum of a row; most resources have one row, peak memory has one
            for each set of tensors that live at the same time.
        borders: what is due between groups of different widths, added to every row.
        widths: (choices,) for each group, the activation widths that borders compare; empty without borders.
    """

    rows: tuple[Row, ...]
    borders: tuple[Border, ...] = ()
    widths: tuple[tuple[int, ...], ...] = ()

    def amount(self, chosen: Sequence[int]) -> float:
        """The amount of an assignment, the index of a choice for each group."""
        sums = [sum(float(values[i]) for values, i in zip(row, chosen, strict=True)) for row in self.rows]
        return max(sums) + self.due(chosen)

    def due(self, chosen: Sequence[int]) -> float:
        """What an assignment costs between groups."""
        widths = [self.widths[group][i] for group, i in enumerate(chosen)] if self.borders else []
        return sum(border.cost for border in self.borders if widths[border.before] != widths[border.behind])


def additive(values: Sequence[Sequence[float]]) -> Resource:
    """The resource whose amount is the sum over groups of `values[group][choice]`."""
    return Resource(rows=(tuple(np.asarray(part, dtype=np.float64) for part in values),))


@dataclass(frozen=True, kw_only=True)
class Solution:
    """An assignment, the index of a choice for each group, and its amount of every resource."""

    chosen: tuple[int, ...]
    amounts: dict[str, float]
