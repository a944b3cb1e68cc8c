"""The best assignments of bits to groups under budgets, and why there are none.

Hubara et al., ICML 2021, arXiv 2006.10518, section 3.4; several budgets at once, any resource minimized, the best few
instead of one. Greedy search and equal widths are what it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from allocation.program import ProgramBuilder, Solver
from allocation.resources import Resource, Solution
from allocation.solvers import HiGHS

SLACK = 1e-9  # relative: a budget that an assignment spends to the last byte is kept
SENSITIVITY = "sensitivity"


def solve(
    resources: Mapping[str, Resource],
    budgets: Mapping[str, float],
    *,
    minimize: str = SENSITIVITY,
    count: int = 1,
    solver: Solver | None = None,
    near: tuple[Sequence[int], int] | None = None,
) -> list[Solution]:
    """The `count` best assignments, best first; fewer where there are no more.

    Args:
        resources: by name, "sensitivity" among them; all have the same groups and choices.
        budgets: the largest amount allowed, by resource; with minimize="size" one of them may bound the sensitivity.
        minimize: the resource of which there shall be least.
        count: how many.
        solver: of the integer program; None: `HiGHS`.
        near: an assignment, and in how many groups another may differ from it.

    Raises:
        ValueError: if a name is unknown, or no assignment keeps all budgets: the error says which budget is too small,
            and the smallest one that can be kept.
    """
    expect_known(resources, budgets, minimize, count)
    found = _best(resources, budgets, minimize, count, solver or HiGHS(), near)
    if not found:
        raise ValueError(why_infeasible(resources, budgets, solver or HiGHS()))
    return found


def keeps(amounts: Mapping[str, float], budgets: Mapping[str, float]) -> bool:
    """Whether no amount is above its budget."""
    return all(amounts[name] <= budget + SLACK * abs(budget) for name, budget in budgets.items())


def solution_of(resources: Mapping[str, Resource], chosen: Sequence[int]) -> Solution:
    """An assignment with its amount of every resource."""
    return Solution(
        chosen=tuple(chosen), amounts={name: resource.amount(chosen) for name, resource in resources.items()}
    )


def _best(
    resources: Mapping[str, Resource],
    budgets: Mapping[str, float],
    minimize: str,
    count: int,
    solver: Solver,
    near: tuple[Sequence[int], int] | None = None,
) -> list[Solution]:
    builder = ProgramBuilder(resources, minimize, budgets)
    if near is not None:
        builder.stay_near(*near)
    found: list[Solution] = []
    while len(found) < count:
        answer = solver(builder.build())
        if answer is None:
            break
        solution = solution_of(resources, builder.read(answer))
        if keeps(solution.amounts, budgets):  # solvers allow themselves a millionth
            found.append(solution)
        if max(builder.sizes) == 1:
            break
        builder.forbid(solution.chosen)
    return sorted(found, key=lambda solution: solution.amounts[minimize])


def why_infeasible(resources: Mapping[str, Resource], budgets: Mapping[str, float], solver: Solver) -> str:
    """Which budget is too small and the smallest one that can be kept, alone or, if all can, beside the others."""
    smallest = {name: _smallest(resources, name, {}, solver) for name in budgets}
    alone = {n: a for n, a in smallest.items() if a is not None and not keeps({n: a}, {n: budgets[n]})}
    if alone:
        texts = [f"{name}: expected at least {least:.6g}, got {budgets[name]:.6g}" for name, least in alone.items()]
        return f"allocation.budget.{'; allocation.budget.'.join(texts)}; no choice of bits needs less"
    texts = []
    for name, budget in budgets.items():
        others = {other: bound for other, bound in budgets.items() if other != name}
        least = _smallest(resources, name, others, solver)
        if least is not None:
            texts.append(f"{name} would have to be at least {least:.6g} instead of {budget:.6g}")
    return (
        f"allocation.budget: expected budgets that can be kept together, got {dict(budgets)}; each can be kept alone, "
        f"but with the others {', or '.join(texts) or 'none of them'}"
    )


def _smallest(
    resources: Mapping[str, Resource], name: str, budgets: Mapping[str, float], solver: Solver
) -> float | None:
    found = _best(resources, budgets, name, 1, solver)
    return found[0].amounts[name] if found else None


def expect_known(
    resources: Mapping[str, Resource], budgets: Mapping[str, float], minimize: str = SENSITIVITY, count: int = 1
) -> None:
    """Raise ValueError for names that no resource has, negative budgets, or a count below one."""
    unknown = {minimize, *budgets} - set(resources)
    if unknown:
        raise ValueError(f"allocation: expected resources among {sorted(resources)}, got {sorted(unknown)}")
    if count < 1:
        raise ValueError(f"allocation.count: expected at least 1 solution, got {count}")
    for name, budget in budgets.items():
        if not budget >= 0:
            raise ValueError(f"allocation.budget.{name}: expected a number of at least 0, got {budget}")
