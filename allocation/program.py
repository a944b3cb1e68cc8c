"""The integer program in matrices: one binary variable for each group and choice, and what solvers need to know.

Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021, arXiv 2006.10518, section
3.4. Every resource's row is divided by its budget, so that bytes, operations and milliseconds have one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from allocation.resources import Resource, Row, Values

SCALE = 1e4  # of the objective: solvers stop at a difference of 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """minimize `objective @ v`, `low <= matrix @ v <= high`, `0 <= v <= upper`, the first `binaries` of v integral."""

    objective: Values
    matrix: csr_array
    low: Values
    high: Values
    upper: Values
    binaries: int


Solver = Callable[[Program], NDArray[np.float64] | None]  # the best v, or None where there is none


class ProgramBuilder:
    """Collects the rows of one program.

    Args:
        resources: by name, all of the same groups and choices.
        minimize: which of them.
        budgets: the largest amount allowed of each of the others that has one.
    """

    def __init__(self, resources: Mapping[str, Resource], minimize: str, budgets: Mapping[str, float]) -> None:
        self.resources = resources
        self.sizes = [len(values) for values in resources[minimize].rows[0]]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.binaries = int(self.starts[-1])
        self.entries: list[dict[int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self.differences: dict[tuple[int, int, int], int] = {}  # (before, behind, width) -> variable
        self.variables = self.binaries
        for start, size in zip(self.starts, self.sizes, strict=False):
            self.add({int(start) + i: 1.0 for i in range(size)}, 1.0, 1.0)
        for name, budget in budgets.items():
            for entries in self._rows_of(resources[name]):
                scale = budget if budget > 0 else 1.0
                self.add({key: value / scale for key, value in entries.items()}, -np.inf, budget / scale)
        self.goal = self._goal(resources[minimize])

    def add(self, entries: dict[int, float], low: float, high: float) -> None:
        """Require `low <= sum of entries[variable] * variable <= high`."""
        self.entries.append(entries)
        self.low.append(low)
        self.high.append(high)

    def forbid(self, chosen: Sequence[int]) -> None:
        """Exclude one assignment (a no-good cut): at least one group with a choice chooses otherwise."""
        picked = [int(self.starts[g]) + i for g, i in enumerate(chosen) if self.sizes[g] > 1]
        self.add(dict.fromkeys(picked, 1.0), -np.inf, len(picked) - 1.0)

    def stay_near(self, chosen: Sequence[int], changes: int) -> None:
        """Exclude assignments that differ in more groups (local branching, Fischetti and Lodi 2003)."""
        picked = {int(self.starts[g]) + i: 1.0 for g, i in enumerate(chosen)}
        self.add(picked, float(len(picked) - changes), np.inf)

    def build(self) -> Program:
        """The program as it stands."""
        rows = [(r, c, v) for r, entries in enumerate(self.entries) for c, v in entries.items()]
        index, columns, values = (np.array(part) for part in zip(*rows, strict=True))
        objective = np.zeros(self.variables)
        objective[list(self.goal)] = list(self.goal.values())
        upper = np.ones(self.variables)
        upper[self.binaries + len(self.differences) :] = np.inf
        return Program(
            objective=objective * (SCALE / max(float(np.abs(objective).sum()), 1e-300)),
            matrix=csr_array((values, (index, columns)), shape=(len(self.entries), self.variables)),
            low=np.array(self.low),
            high=np.array(self.high),
            upper=upper,
            binaries=self.binaries,
        )

    def read(self, solution: Values) -> tuple[int, ...]:
        """The choice of each group in a solver's answer."""
        parts = [solution[a:b] for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
        return tuple(int(part.argmax()) for part in parts)

    def _goal(self, resource: Resource) -> dict[int, float]:
        rows = self._rows_of(resource, shift=len(resource.rows) == 1)
        if len(rows) == 1:
            return rows[0]
        largest = self.variables  # the smallest number that no row exceeds
        self.variables += 1
        scale = max(max(entries.values(), default=0.0) for entries in rows) or 1.0
        for entries in rows:
            self.add({**{key: value / scale for key, value in entries.items()}, largest: -1.0}, -np.inf, 0.0)
        return {largest: 1.0}

    def _rows_of(self, resource: Resource, *, shift: bool = False) -> list[dict[int, float]]:
        """The rows of a resource as entries of variables; shifted: without what every choice of a group costs."""
        due: dict[int, float] = {}
        for before, behind, cost in resource.borders:
            for width in sorted(set(resource.widths[before])):
                variable = self._difference(resource, before, behind, width)
                due[variable] = due.get(variable, 0.0) + cost
        return [self._entries(row, shift) | due for row in resource.rows]

    def _entries(self, row: Row, shift: bool) -> dict[int, float]:
        flat = np.concatenate([values - (values.min() if shift else 0.0) for values in row])
        return {i: float(value) for i, value in enumerate(flat) if value}

    def _difference(self, resource: Resource, before: int, behind: int, width: int) -> int:
        """A variable, at least 1 where `before` has this width and `behind` has not: y >= z_before - z_behind."""
        key = (before, behind, width)
        if key not in self.differences:
            assert self.variables == self.binaries + len(self.differences)
            self.differences[key] = variable = self.variables
            self.variables += 1
            entries = {variable: -1.0}
            for group, sign in ((before, 1.0), (behind, -1.0)):
                own = [int(self.starts[group]) + i for i, w in enumerate(resource.widths[group]) if w == width]
                entries |= dict.fromkeys(own, sign)
            self.add(entries, -np.inf, 0.0)
        return self.differences[key]
