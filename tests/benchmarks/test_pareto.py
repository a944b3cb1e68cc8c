"""The Pareto benchmark: its sweeps compose, its summary and picture are those of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pareto import commands, draw, summary
from tests.configuration import composed


def row(allocation: str, budget: float, top1: float) -> dict[str, Any]:
    size = budget / 32 + 0.01
    return {"allocation": allocation, "budget": budget, "top1": top1, "size_fraction": size, "float_top1": 91.7}


def test_every_sweep_composes() -> None:
    found = commands([3.0, 3.5, 4.0], [0, 1], ["bits.activation=8"], additivity=5)
    assert [next(o for o in sweep if o.startswith("allocation=")) for sweep in found] == [
        "allocation=uniform",
        "allocation=integer_program",
        "allocation=calibrant",
        "allocation=greedy",
    ]
    assert "bits.weight=3,4" in found[0]
    for sweep in found:
        composed([override.split(",")[0] for override in sweep])


def test_methods_may_be_left_out() -> None:
    found = commands([3.0], [0], [], additivity=0, methods=["greedy", "uniform"])
    assert [next(word for word in line if word.startswith("allocation=")) for line in found] == [
        "allocation=uniform",
        "allocation=greedy",
    ]


def test_equal_widths_spend_what_they_can(tmp_path: Path) -> None:
    rows = [row("integer_program", b, t) for b, t in ((3, 88.0), (3, 86.0), (3.5, 89.0), (4, 90.0))]
    rows += [row("uniform", 3, 86.5), row("uniform", 4, 91.0), row("greedy", 3, 86.9), row("greedy", 3.5, 88.0)]
    lines = summary(rows)
    assert lines[0] == "3 bits: integer_program 87.00, greedy 86.90, uniform 86.50"
    assert lines[1] == "3.5 bits: integer_program 89.00, greedy 88.00, uniform 86.50"
    assert lines[-1] == "integer_program beats greedy search and equal widths at 2 of 3 budgets"
    lines = summary([*rows, row("calibrant", 3, 87.5)])
    assert lines[-1] == "calibrant beats greedy search and equal widths at 1 of 3 budgets"
    assert draw(rows, tmp_path / "pareto.png").stat().st_size > 0
