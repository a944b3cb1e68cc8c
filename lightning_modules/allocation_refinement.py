"""From an integer program's solution to a better one: sensitivities are measured anew with the network as it stands.

Sums of sensitivities measured on a float network miss what layers do to each other at few bits. Each round measures
every group's options with the rest at the best assignment so far, solves the program of these numbers within fewer and
fewer changes (local branching: Fischetti and Lodi, Mathematical Programming 98, 2003), and keeps what a measurement of
the network as a whole finds better. Calibrant's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from allocation.program import Solver
from allocation.resources import Resource, Solution, additive
from allocation.sensitivity import OutputSensitivity
from allocation.solve import SENSITIVITY, solution_of, solve

if TYPE_CHECKING:
    from lightning_modules.stored_sensitivity import Bench, Score

Tried = Callable[[Solution, "Score"], None]


def refine(
    bench: Bench,
    resources: Mapping[str, Resource],
    budgets: Mapping[str, float],
    *,
    start: Solution,
    score: Score,
    rounds: int,
    solver: Solver | None,
    note: Tried,
) -> Solution:
    """The assignment of the least divergence from the teacher that was found.

    Args:
        bench: what measures.
        resources: by name, "sensitivity" among them.
        budgets: the largest amount allowed, by resource.
        start: the solution to begin with.
        score: what was measured of it as a whole.
        rounds: the most measurements of all groups; it ends before when nothing better is found.
        solver: of the integer program; None: HiGHS.
        note: told of everything else that is measured as a whole.
    """
    best, seen = start, {start.chosen}
    for _ in range(rounds):
        local = dict(resources) | {SENSITIVITY: around(bench, best.chosen)}
        found: dict[tuple[int, ...], Score] = {}
        changes = len(bench.groups)
        while changes >= 1:
            candidate = solve(local, budgets, solver=solver, near=(best.chosen, changes))[0].chosen
            if candidate not in seen:
                found[candidate] = bench.score(candidate)
                note(solution_of(resources, candidate), found[candidate])
                seen.add(candidate)
            changes //= 2
        better = min(found, key=lambda chosen: found[chosen].divergence, default=None)
        if better is None or found[better].divergence >= score.divergence:
            break
        best, score = solution_of(resources, better), found[better]
    return best


def around(bench: Bench, chosen: tuple[int, ...]) -> Resource:
    """The divergence of each option of each group, the rest as chosen, above that of the group's best option."""
    measured, _ = bench.sensitivities(OutputSensitivity("kl"), around=chosen)
    return additive([found.values.tolist() for found in measured])


def facts_of(solution: Solution, score: Score) -> dict[str, Any]:
    """What is recorded of an assignment that was measured as a whole."""
    amounts = {name: solution.amounts[name] for name in (SENSITIVITY, "size")}
    return amounts | {key: value for key, value in score._asdict().items() if value is not None}
