"""What the integer program is compared with: greedy search, and the same widths everywhere.

Greedy search by sensitivity for cost is that of AIMET's mixed precision. Nothing is ever taken back, which is what the
integer program does better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from allocation.resources import Resource, Solution, Values
from allocation.solve import SENSITIVITY, SLACK, expect_known, keeps, solution_of, why_infeasible
from allocation.solvers import HiGHS

Positions = NDArray[np.intp]


def solve_greedily(resources: Mapping[str, Resource], budgets: Mapping[str, float]) -> list[Solution]:
    """From the cheapest choices upwards: again and again the change that lowers sensitivity most for what it costs.

    The cost of a change is the largest share of a budget that it takes.

    Args:
        resources: by name, "sensitivity" among them.
        budgets: the largest amount allowed, by resource.

    Raises:
        ValueError: if a name is unknown, or the cheapest choices are above a budget.
    """
    expect_known(resources, budgets)
    search = _Search(resources, budgets)
    if not keeps(solution_of(resources, search.chosen).amounts, budgets):
        raise ValueError(why_infeasible(resources, budgets, HiGHS()))
    while search.step():
        pass
    return [solution_of(resources, search.chosen)]


class _Search:
    """The assignment so far, with all changes of one group as flat arrays."""

    def __init__(self, resources: Mapping[str, Resource], budgets: Mapping[str, float]) -> None:
        self.resources, self.budgets = resources, budgets
        sensitivity = resources[SENSITIVITY].rows[0]
        self.groups = np.concatenate([np.full(len(values), g) for g, values in enumerate(sensitivity)])
        self.choices = np.concatenate([np.arange(len(values)) for values in sensitivity])
        self.flat = {
            name: np.stack([np.concatenate(row) for row in resources[name].rows]) for name in (SENSITIVITY, *budgets)
        }
        shares = sum((self.flat[n].sum(0) / (b or 1.0) for n, b in budgets.items()), np.zeros(len(self.groups)))
        order = shares if budgets else self.flat[SENSITIVITY][0]
        self.chosen = [int(order[self.groups == g].argmin()) for g in range(len(sensitivity))]

    def step(self) -> bool:
        """Make the best change; False where none helps within the budgets."""
        current = np.flatnonzero(self.choices == np.array(self.chosen)[self.groups])  # one flat position a group
        gain = -self._change(SENSITIVITY, current)[0]
        allowed, share = gain > 0, np.zeros(len(gain))
        for name, budget in self.budgets.items():
            sums = self.flat[name][:, current].sum(1, keepdims=True)
            then = (sums + self._change(name, current)).max(0) + self._borders(name, allowed)
            allowed &= then <= budget + SLACK * abs(budget)
            now = self.resources[name].amount(self.chosen)
            share = np.maximum(share, (then - now) / (budget or 1.0))
        if not allowed.any():
            return False
        best = int(np.where(allowed, gain / np.maximum(share, 1e-12), -np.inf).argmax())
        self.chosen[self.groups[best]] = int(self.choices[best])
        return True

    def _change(self, name: str, current: Positions) -> Values:  # (rows, all choices)
        values = self.flat[name]
        return values - values[:, current][:, self.groups]

    def _borders(self, name: str, wanted: NDArray[np.bool_]) -> Values:
        """What is due between groups after each change."""
        resource, due = self.resources[name], np.zeros(len(self.groups))
        if resource.borders:
            for i in np.flatnonzero(wanted):
                changed = list(self.chosen)
                changed[self.groups[i]] = int(self.choices[i])
                due[i] = resource.due(changed)
        return due


def solve_uniformly(
    resources: Mapping[str, Resource], budgets: Mapping[str, float], pairs: Sequence[Sequence[tuple[int, int]]]
) -> list[Solution]:
    """The same pair of widths for every group that has a choice: the least sensitive one that keeps the budgets.

    Args:
        resources: by name, "sensitivity" among them.
        budgets: the largest amount allowed, by resource.
        pairs: for each group, its choices.

    Raises:
        ValueError: if no pair is open to all groups within the budgets.
    """
    expect_known(resources, budgets)
    free = [choices for choices in pairs if len(choices) > 1]
    common = [pair for pair in (free[0] if free else []) if all(pair in choices for choices in free)]
    tried = [[choices.index(pair) if len(choices) > 1 else 0 for choices in pairs] for pair in common]
    kept = [s for s in (solution_of(resources, chosen) for chosen in tried) if keeps(s.amounts, budgets)]
    if not kept:
        raise ValueError(
            f"allocation.budget: expected room for one pair of widths in all groups, of {common or 'none in common'}, "
            f"got {dict(budgets)}; choose allocation=integer_program"
        )
    return [min(kept, key=lambda solution: solution.amounts[SENSITIVITY])]
