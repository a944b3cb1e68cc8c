"""The ways of choosing as options: the integer program and greedy search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from allocation.baselines import solve_greedily
from allocation.program import Solver
from allocation.resources import Resource, Solution
from allocation.solve import SENSITIVITY, solve


class IntegerProgram:
    """The best assignments there are.

    Args:
        count: how many of the best to give; each is then evaluated as a whole.
        solver: see `allocation.solvers`; None: HiGHS.

    Raises:
        ValueError: if `count` is not positive.
    """

    name: ClassVar[str] = "integer_program"

    def __init__(self, count: int = 1, solver: Solver | None = None) -> None:
        if count < 1:
            raise ValueError(f"allocation.method.count: expected at least 1 solution, got {count}")
        self.count = count
        self.solver = solver

    def __call__(
        self, resources: Mapping[str, Resource], budgets: Mapping[str, float], minimize: str = SENSITIVITY
    ) -> list[Solution]:
        """See `allocation.solve.solve`."""
        return solve(resources, budgets, minimize=minimize, count=self.count, solver=self.solver)


class Greedy:
    """Sensitivity for cost, one change after the other."""

    name: ClassVar[str] = "greedy"

    def __call__(
        self, resources: Mapping[str, Resource], budgets: Mapping[str, float], minimize: str = SENSITIVITY
    ) -> list[Solution]:
        """See `allocation.baselines.solve_greedily`.

        Raises:
            ValueError: if something else than the sensitivity is to be minimized.
        """
        if minimize != SENSITIVITY:
            raise ValueError(
                f"allocation.minimize: greedy search expects sensitivity, got {minimize!r}; use integer_program"
            )
        return solve_greedily(resources, budgets)
