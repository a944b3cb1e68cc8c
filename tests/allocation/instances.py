"""Random allocation problems, and their solution by trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from allocation.resources import Border, Resource, additive


def resources_of(
    rng: np.random.Generator, groups: int, choices: int, costs: int, *, borders: bool = False, sizes: bool = False
) -> dict[str, Resource]:
    """Sensitivities that fall and costs that grow with the bits, log-normal over groups; `sizes`: groups of fewer
    choices too.
    """
    counts = [int(rng.integers(1, choices + 1)) if sizes else choices for _ in range(groups)]
    falling = [np.sort(rng.lognormal(-3, 2, n))[::-1] for n in counts]
    found = {"sensitivity": additive(falling)}
    for i in range(costs):
        growing = [np.sort(rng.lognormal(3, 1, n)) for n in counts]
        edges = tuple(Border(g, g + 1, float(rng.lognormal(1, 1))) for g in range(groups - 1))
        widths = tuple(tuple(int(w) for w in rng.integers(2, 5, n)) for n in counts)
        if borders and i == 0:
            found[f"cost{i}"] = Resource(rows=(tuple(growing),), borders=edges, widths=widths)
        elif borders and i == 1:  # peak memory: the largest of two sums
            second = tuple(values * rng.uniform(0, 2) for values in growing)
            found[f"cost{i}"] = Resource(rows=(tuple(growing), second))
        else:
            found[f"cost{i}"] = additive(growing)
    return found


def budgets_of(rng: np.random.Generator, resources: Mapping[str, Resource]) -> dict[str, float]:
    """For each cost a budget between its least and its largest amount, often too small beside the others."""
    budgets = {}
    for name, resource in resources.items():
        if name != "sensitivity":
            sums = [[(values.min(), values.max()) for values in row] for row in resource.rows]
            low, high = np.max(np.sum(sums, axis=1), axis=0)
            budgets[name] = float(low + (high - low) * rng.uniform(0.05, 0.9))
    return budgets


def everything(
    resources: Mapping[str, Resource], budgets: Mapping[str, float], minimize: str
) -> list[tuple[float, tuple[int, ...]]]:
    """Every assignment within the budgets with its amount of `minimize`, best first."""
    counts = [range(len(values)) for values in resources["sensitivity"].rows[0]]
    found = []
    for chosen in itertools.product(*counts):
        if all(total(resources[name], chosen) <= budget * (1 + 1e-9) for name, budget in budgets.items()):
            found.append((total(resources[minimize], chosen), chosen))
    return sorted(found)


def total(resource: Resource, chosen: tuple[int, ...]) -> float:
    """The amount of an assignment, by plain loops."""
    largest = 0.0
    for row in resource.rows:
        amount = 0.0
        for values, i in zip(row, chosen, strict=True):
            amount += values[i]
        largest = max(largest, amount)
    for before, behind, cost in resource.borders:
        if resource.widths[before][chosen[before]] != resource.widths[behind][chosen[behind]]:
            largest += cost
    return largest
