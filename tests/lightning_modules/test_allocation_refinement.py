"""Refinement of an integer program's solution, on harm that does not add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from allocation.monotone import Measured
from allocation.resources import Resource, additive
from allocation.solve import solve
from lightning_modules.allocation_refinement import refine
from lightning_modules.stored_sensitivity import Score
from tests.allocation.instances import everything

GROUPS, OPTIONS = 5, 3


@dataclass
class PairwiseBench:
    """Harm of single groups and of pairs: what a bench measures, from a table."""

    seed: int
    groups: list[int] = field(default_factory=lambda: list(range(GROUPS)))
    measured: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        falling = np.array([1.0, 0.2, 0.0])
        self.single = rng.lognormal(0, 1, (GROUPS, 1)) * falling
        self.pair = rng.lognormal(0, 1.5, (GROUPS, GROUPS)) * np.triu(np.ones((GROUPS, GROUPS)), 1)
        self.falling = falling

    def harm(self, chosen: Sequence[int]) -> float:
        noise = self.falling[list(chosen)]
        return float(sum(self.single[g, i] for g, i in enumerate(chosen)) + noise @ self.pair @ noise)

    def score(self, chosen: Sequence[int]) -> Score:
        self.measured += 1
        return Score(0.0, self.harm(chosen), None)

    def sensitivities(self, _: Any, around: Sequence[int]) -> tuple[list[Measured], float]:
        found = []
        for g in range(GROUPS):
            values = np.array([self.harm([*around[:g], i, *around[g + 1 :]]) for i in range(OPTIONS)])
            found.append(Measured(values - values.min(), np.zeros(OPTIONS)))
        return found, self.harm(around)


def problem(seed: int) -> tuple[PairwiseBench, dict[str, Resource], dict[str, float]]:
    bench = PairwiseBench(seed)
    costs = additive([[2.0, 4.0, 8.0]] * GROUPS)
    resources = {"sensitivity": additive(bench.single.tolist()), "size": costs}
    return bench, resources, {"size": 2.0 * GROUPS + 8.0}


@pytest.mark.parametrize("seed", range(20))
def test_it_is_never_worse_than_its_start_and_keeps_the_budgets(seed: int) -> None:
    bench, resources, budgets = problem(seed)
    (start,) = solve(resources, budgets)
    noted = [(start.amounts["size"], bench.harm(start.chosen))]
    found = refine(
        cast(Any, bench), resources, budgets, start=start, score=bench.score(start.chosen), rounds=4, solver=None,
        note=lambda solution, score: noted.append((solution.amounts["size"], score.divergence)),
    )  # fmt: skip
    assert bench.harm(found.chosen) == min(harm for _, harm in noted) <= bench.harm(start.chosen)
    assert all(size <= budgets["size"] for size, _ in noted)
    assert len(noted) == bench.measured
    assert found.amounts["sensitivity"] == pytest.approx(resources["sensitivity"].amount(found.chosen))


def test_it_closes_most_of_the_gap_to_trying_everything() -> None:
    gaps = []
    for seed in range(30):
        bench, resources, budgets = problem(seed)
        (start,) = solve(resources, budgets)
        best = min(bench.harm(chosen) for _, chosen in everything(resources, budgets, "sensitivity"))
        arguments: dict[str, Any] = {"start": start, "score": bench.score(start.chosen), "solver": None}
        found = refine(cast(Any, bench), resources, budgets, **arguments, rounds=4, note=lambda *_: None)
        gaps.append((bench.harm(start.chosen) - best, bench.harm(found.chosen) - best))
    before, after = np.array(gaps).sum(0)
    assert before > 0
    assert after < 0.35 * before


def test_without_rounds_it_is_the_start() -> None:
    bench, resources, budgets = problem(0)
    (start,) = solve(resources, budgets)
    arguments: dict[str, Any] = {
        "start": start,
        "score": bench.score(start.chosen),
        "rounds": 0,
        "solver": None,
        "note": lambda *_: None,
    }
    assert refine(cast(Any, bench), resources, budgets, **arguments) is start
