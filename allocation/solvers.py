"""Who solves the integer program: HiGHS, which scipy brings along, or CBC, as in the paper, where PuLP is installed."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from allocation.program import Program

log = logging.getLogger(__name__)
INFEASIBLE = 2  # scipy.optimize.milp's status


class HiGHS:
    """`scipy.optimize.milp`: deterministic, no further dependency.

    Args:
        gap: relative distance from the optimum at which to stop.
        time_limit: seconds; the best solution so far is used then, with a warning.
    """

    def __init__(self, gap: float = 1e-6, time_limit: float = 60.0) -> None:
        self.gap = gap
        self.time_limit = time_limit

    def __call__(self, program: Program) -> NDArray[np.float64] | None:
        """The best assignment's variables, or None where no assignment keeps the budgets.

        Raises:
            RuntimeError: if the solver fails, or finds nothing within its time.
        """
        integral = np.arange(len(program.objective)) < program.binaries
        rows: tuple[Any, Any, Any] = (program.matrix, program.low, program.high)
        upper: Any = program.upper
        found = milp(
            program.objective,
            integrality=integral.astype(int),
            bounds=Bounds(0.0, upper),
            constraints=LinearConstraint(*rows),
            options={"mip_rel_gap": self.gap, "time_limit": self.time_limit},
        )
        if found.status == INFEASIBLE:
            return None
        if found.x is None:
            raise RuntimeError(
                f"integer program: {found.message}; give it more time with allocation.method.solver.time_limit"
            )
        if not found.success:
            log.warning("integer program: %s; the best solution so far is used", found.message)
        return found.x


class CBC:
    """CBC through PuLP, the solver of the paper's released code; needs `pip install calibrant[cbc]`.

    Args:
        gap: relative distance from the optimum at which to stop.
        time_limit: seconds.

    Raises:
        ValueError: if PuLP or CBC is not installed.
    """

    def __init__(self, gap: float = 1e-6, time_limit: float = 60.0) -> None:
        try:
            self.pulp: Any = importlib.import_module("pulp")
        except ImportError as error:
            raise _not_installed("PuLP") from error
        self.command = self._command({"msg": False, "gapRel": gap, "timeLimit": time_limit})

    def _command(self, settings: dict[str, Any]) -> Any:
        """CBC from the package cbcbox, from the PATH, or as older PuLP brings it along."""
        try:
            path = importlib.import_module("cbcbox").cbc_bin_path()
        except ImportError:
            path = None
        found = self.pulp.COIN_CMD(path=path, **settings)
        if not found.available() and hasattr(self.pulp, "PULP_CBC_CMD"):
            found = self.pulp.PULP_CBC_CMD(**settings)
        if not found.available():
            raise _not_installed("CBC")
        return found

    def __call__(self, program: Program) -> NDArray[np.float64] | None:
        """See `HiGHS`."""
        pulp = self.pulp
        problem = pulp.LpProblem("allocation", pulp.LpMinimize)
        kinds = [pulp.LpBinary if i < program.binaries else pulp.LpContinuous for i in range(len(program.objective))]
        upper = [None if np.isinf(bound) else float(bound) for bound in program.upper]
        variable = getattr(problem, "add_variable", pulp.LpVariable)  # PuLP 4 makes them this way alone
        variables = [variable(f"v{i}", 0, upper[i], kind) for i, kind in enumerate(kinds)]
        problem += pulp.lpSum(float(c) * v for c, v in zip(program.objective, variables, strict=True) if c)
        for i, (low, high) in enumerate(zip(program.low, program.high, strict=True)):
            start, end = program.matrix.indptr[i : i + 2]
            entries = zip(program.matrix.indices[start:end], program.matrix.data[start:end], strict=True)
            total = pulp.lpSum(float(value) * variables[column] for column, value in entries)
            if low == high:
                problem += total == float(high)
            else:
                problem += total <= float(high)
        problem.solve(self.command)
        if pulp.LpStatus[problem.status] == "Infeasible":
            return None
        if pulp.LpStatus[problem.status] != "Optimal":
            raise RuntimeError(
                f"integer program: CBC ends with {pulp.LpStatus[problem.status]}; give it more time with "
                "allocation.method.solver.time_limit"
            )
        if problem.sol_status != pulp.LpSolutionOptimal:
            log.warning("integer program: CBC ran out of time; the best solution so far is used")
        return np.array([variable.value() or 0.0 for variable in variables])


def _not_installed(what: str) -> ValueError:
    return ValueError(
        f"allocation.method.solver: expected {what} to be installed for CBC, got none; pip install calibrant[cbc], or "
        "use the default allocation.method.solver._target_=allocation.solvers.HiGHS"
    )
