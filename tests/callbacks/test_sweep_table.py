"""The sweep's table: mean and deviation over seeds, failures listed."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path

from rich.console import Console

from callbacks.sweep_table import sweep_table


def write(folder: Path, overrides: list[str], top1: float, status: str = "finished") -> None:
    folder.mkdir()
    metrics = {"test/float/top1": 90.0, "test/nearest/top1": 50.0, "test/quantized/top1": top1}
    facts = {
        "status": status,
        "overrides": overrides,
        "metrics": metrics,
        "config": {"name": "x"},
        "error": "ValueError: no",
    }
    (folder / "record.json").write_text(json.dumps(facts))


def test_seeds_are_grouped_and_failures_named(tmp_path: Path) -> None:
    values = [80.0, 81.0, 83.0]
    for seed, value in enumerate(values):
        write(tmp_path / f"run{seed}", ["bits=w4a4", f"seed={seed}"], value)
    write(tmp_path / "run3", ["bits=w2a2", "seed=0"], 10.0, status="failed")
    console = Console(width=160, file=io.StringIO())
    console.print(sweep_table(tmp_path))
    text = console.file.getvalue()
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in text
    assert "run3" in text
    assert "ValueError: no" in text
