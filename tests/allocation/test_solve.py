"""The integer program against trying everything, and what budgets promise."""

from __future__ import annotations

import itertools
import re
import sys

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.baselines import solve_greedily, solve_uniformly
from allocation.resources import additive
from allocation.solve import solve
from allocation.solvers import CBC, HiGHS
from tests.allocation.instances import budgets_of, everything, resources_of


@pytest.mark.parametrize("seed", range(200))
def test_equals_trying_everything(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups, choices, costs = int(rng.integers(2, 9)), int(rng.integers(2, 4)), int(rng.integers(1, 4))
    resources = resources_of(rng, groups, choices, costs, borders=seed % 2 == 1, sizes=seed % 3 == 0)
    budgets = budgets_of(rng, resources)
    minimize = "sensitivity"
    if seed % 4 == 0:  # the other way round: least cost under a bound on the sensitivity
        minimize = "cost0"
        budgets = {"sensitivity": resources["sensitivity"].amount([0] * groups) * float(rng.uniform(0.1, 1.0))}
    expected = everything(resources, budgets, minimize)
    if not expected:
        with pytest.raises(ValueError, match=r"allocation\.budget"):
            solve(resources, budgets, minimize=minimize)
        return
    found = solve(resources, budgets, minimize=minimize, count=3)
    best = [amount for amount, _ in expected[:3]]
    assert [s.amounts[minimize] for s in found] == pytest.approx(best, rel=1e-5, abs=1e-12)
    assert len({s.chosen for s in found}) == len(found)


def test_two_hundred_groups_within_the_solvers_own_limit() -> None:
    rng = np.random.default_rng(0)
    resources = resources_of(rng, 200, 16, 3)
    budgets = {name: resources[name].amount([8] * 200) for name in ("cost0", "cost1", "cost2")}
    (found,) = solve(resources, budgets, solver=HiGHS(time_limit=30.0))
    greedy = solve_greedily(resources, budgets)[0].amounts["sensitivity"]
    assert found.amounts["sensitivity"] < greedy <= resources["sensitivity"].amount([8] * 200)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), looser=st.floats(1.0, 3.0))
def test_a_looser_budget_is_never_worse(seed: int, looser: float) -> None:
    rng = np.random.default_rng(seed)
    resources = resources_of(rng, 6, 4, 2)
    budgets = {name: resources[name].amount([1] * 6) for name in ("cost0", "cost1")}
    tight = solve(resources, budgets)[0]
    loose = solve(resources, budgets | {"cost0": budgets["cost0"] * looser})[0]
    assert loose.amounts["sensitivity"] <= tight.amounts["sensitivity"] * (1 + 1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_never_worse_than_greedy_and_equal_widths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    resources = resources_of(rng, 6, 4, 2, borders=seed % 2 == 0)
    budgets = {name: resources[name].amount([2] * 6) for name in ("cost0", "cost1")}
    best = solve(resources, budgets)[0].amounts["sensitivity"] * (1 - 1e-5)
    pairs = [[(2, 2), (4, 4), (6, 6), (8, 8)]] * 6
    equal = solve_uniformly(resources, budgets, pairs)[0]
    assert equal.chosen == (2,) * 6 or equal.amounts["sensitivity"] <= resources["sensitivity"].amount([2] * 6)
    greedy = solve_greedily(resources, {name: budget * 2 for name, budget in budgets.items()})[0]
    assert all(greedy.amounts[name] <= 2 * budget * (1 + 1e-9) for name, budget in budgets.items())
    assert best <= equal.amounts["sensitivity"]
    loose = solve(resources, {name: budget * 2 for name, budget in budgets.items()})[0]
    assert loose.amounts["sensitivity"] <= greedy.amounts["sensitivity"] * (1 + 1e-5)


def test_greedy_takes_the_best_ratio_first() -> None:
    """Two upgrades fit one budget singly: greedy takes the better ratio and misses the better total."""
    resources = {"sensitivity": additive([[6.0, 0.0], [10.0, 0.0]]), "size": additive([[0.0, 1.0], [0.0, 2.0]])}
    assert solve_greedily(resources, {"size": 2.0})[0].chosen == (1, 0)
    assert solve(resources, {"size": 2.0})[0].chosen == (0, 1)


def test_a_budget_below_the_smallest_amount_is_named() -> None:
    resources = {"sensitivity": additive([[1.0, 0.0]] * 3), "size": additive([[2.0, 5.0]] * 3)}
    with pytest.raises(ValueError, match=re.escape("allocation.budget.size: expected at least 6, got 5.5")):
        solve(resources, {"size": 5.5})
    with pytest.raises(ValueError, match=re.escape("size: expected at least 6")):
        solve_greedily(resources, {"size": 5.5})
    assert solve(resources, {"size": 6.0})[0].chosen == (0, 0, 0)


def test_budgets_that_only_exclude_each_other_are_named() -> None:
    """Size wants the first choice of the group, latency the second."""
    resources = {
        "sensitivity": additive([[1.0, 0.0]]),
        "size": additive([[1.0, 3.0]]),
        "latency": additive([[4.0, 2.0]]),
    }
    with pytest.raises(ValueError, match=r"size would have to be at least 3 instead of 2.*latency .* at least 4"):
        solve(resources, {"size": 2.0, "latency": 3.0})


def test_fewer_solutions_than_asked_for() -> None:
    resources = {"sensitivity": additive([[1.0, 0.0], [2.0]]), "size": additive([[1.0, 3.0], [1.0]])}
    assert [s.chosen for s in solve(resources, {"size": 4.0}, count=5)] == [(1, 0), (0, 0)]
    assert [s.chosen for s in solve({"sensitivity": additive([[1.0]])}, {}, count=5)] == [(0,)]


def test_unknown_names_and_numbers_are_refused() -> None:
    resources = {"sensitivity": additive([[1.0, 0.0]])}
    with pytest.raises(ValueError, match=r"expected resources among \['sensitivity'\], got \['speed'\]"):
        solve(resources, {"speed": 1.0})
    with pytest.raises(ValueError, match=r"allocation\.count.*got 0"):
        solve(resources, {}, count=0)
    with pytest.raises(ValueError, match=r"budget\.sensitivity.*got -1"):
        solve(resources, {"sensitivity": -1.0})
    with pytest.raises(ValueError, match="one pair of widths in all groups"):
        solve_uniformly(resources, {"sensitivity": 0.0}, [[(2, 2), (3, 3)]][:0])


@pytest.mark.parametrize("seed", range(5))
def test_cbc_agrees(seed: int) -> None:
    rng = np.random.default_rng(seed)
    resources = resources_of(rng, 6, 4, 2, borders=True)
    budgets = {name: resources[name].amount([2] * 6) for name in ("cost0", "cost1")}
    with_cbc, with_highs = (solve(resources, budgets, solver=solver)[0] for solver in (CBC(), HiGHS()))
    assert with_cbc.amounts["sensitivity"] == pytest.approx(with_highs.amounts["sensitivity"], rel=1e-4)
    least = {"cost0": min(resources["cost0"].amount(c) for c in itertools.product(range(4), repeat=6)) - 1e-3}
    with pytest.raises(ValueError, match="cost0"):
        solve(resources, least, solver=CBC())


def test_cbc_out_of_time_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    finished = pulp.LpProblem.solve

    def interrupted(problem: pulp.LpProblem, solver: object) -> int:
        status = finished(problem, solver)
        problem.sol_status = pulp.LpSolutionIntegerFeasible
        return status

    monkeypatch.setattr(pulp.LpProblem, "solve", interrupted)
    solve({"sensitivity": additive([[1.0, 0.0]])}, {}, solver=CBC())
    assert "CBC ran out of time" in caplog.text


@pytest.mark.parametrize(("package", "missing"), [("pulp", "PuLP"), ("cbcbox", "CBC")])
def test_without_cbc_the_remedy_is_named(package: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("pulp.PULP_CBC_CMD", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=rf"expected {missing} to be installed.*pip install calibrant\[cbc\]"):
        CBC()


@pytest.mark.parametrize("changes", [0, 1, 2, 4])
def test_near_an_assignment_equals_trying_everything_near_it(changes: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        resources = resources_of(rng, 5, 3, 1, sizes=seed % 2 == 0)
        near = [0] * 5
        budgets = {"cost0": resources["cost0"].amount(near) * 3}
        close = [
            amount
            for amount, chosen in everything(resources, budgets, "sensitivity")
            if sum(a != b for a, b in zip(chosen, near, strict=True)) <= changes
        ]
        (found,) = solve(resources, budgets, near=(near, changes))
        assert found.amounts["sensitivity"] == pytest.approx(close[0], rel=1e-5)
