"""From a run's own measurement to widths under a budget of latency: the table is written and read by two commands."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate

import commands
from lightning_modules.allocation import read_bits
from run import run_job
from tests.configuration import SMALL, composed, options

QUICK = [*SMALL, "calibration=noise", "reconstruction=none", "protocol=onnxruntime"]
SEARCH = [*QUICK, "allocation=integer_program", "hardware=int4_int8", "bits=w8a8", "allocation.weight_bits=[4,8]"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_job(composed([*QUICK, "bits=w8a8"], folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deployment.latency_table.TURN", 0.002)
        patch.setattr(sys, "argv", ["calibrant", "benchmark", str(folder), "--rounds", "3"])
        commands.main()
    return folder / "latency_table.csv"


def searched(folder: Path, table: Path, budget: float) -> dict[str, float]:
    cfg = composed([*SEARCH, f"allocation.budget.latency={budget}", f"allocation.latency_table={table}"], folder)
    run_job(cfg)
    return json.loads((folder / "record.json").read_text())["allocation"]["amounts"]


def test_the_table_has_every_layer_at_what_each_hardware_offers(table: Path) -> None:
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert list(rows[0]) == ["layer", "weight", "activation", "milliseconds"]
    found: dict[str, set[tuple[int, int]]] = {}
    for row in rows:
        found.setdefault(row["layer"], set()).add((int(row["weight"]), int(row["activation"])))
    assert len(found) == 8
    for name in options("hardware"):
        for kind, pairs in instantiate(composed([f"hardware={name}"]).hardware).pairs.items():
            assert all((pairs or {(2, 2), (5, 8), (8, 32), (32, 32)}) <= own for own in found.values()), (name, kind)


def test_widths_are_found_under_a_budget_of_the_table(table: Path, tmp_path: Path) -> None:
    rows = list(csv.DictReader(table.read_text().splitlines()))
    whole = sum(float(row["milliseconds"]) for row in rows if (row["weight"], row["activation"]) == ("8", "8"))
    amounts = searched(tmp_path / "a", table, 1.01 * whole)
    assert amounts["latency"] == pytest.approx(whole)
    pairs = read_bits(tmp_path / "a" / "allocation.yaml")
    assert set(pairs) == {row["layer"] for row in rows}
    assert set(pairs.values()) <= {(4, 8), (8, 8)}
    with pytest.raises(ValueError, match=r"allocation\.budget\.latency: expected at least 0\.\d+, got 1e-06"):
        searched(tmp_path / "b", table, 1e-6)
