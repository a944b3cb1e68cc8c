"""Accuracy against size: the integer program, greedy search and equal widths under the same budgets.

    python -m benchmarks.pareto cifar10_resnet20 -- experiment=cifar10_resnet20_ranges bits.activation=8
    python -m benchmarks.pareto cifar10_resnet20 --collect multirun/<folder> ...     runs that have already been made

A budget of b average bits is the size of the network with b bits everywhere; equal widths spend a budget of 3.5 as 3.
Writes `benchmarks/results/pareto_<name>.csv` (one row a run), `.png`, and `pareto_<name>_additivity.csv` (random
networks, predicted and measured harm). What stands after `--` goes to every run.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from allocation.additivity import rank_correlation
from benchmarks.table import RESULTS, ROOT, collect
from callbacks.report import write_csv

PROGRAMS = ("integer_program", "calibrant")
METHODS = (*PROGRAMS, "greedy", "uniform")


def commands(
    budgets: Sequence[float],
    seeds: Sequence[int],
    overrides: Sequence[str],
    additivity: int,
    methods: Sequence[str] = METHODS,
) -> list[list[str]]:
    """Arguments of run.py for each method: a sweep over budgets and seeds."""
    seed = f"seed={','.join(map(str, seeds))}"
    widths = sorted({math.floor(budget) for budget in budgets})
    uniform = [*overrides, "allocation=uniform", f"bits.weight={','.join(map(str, widths))}", seed]
    found = [uniform] if "uniform" in methods else []
    for method in (own for own in METHODS[:-1] if own in methods):
        allowed = f"allocation.budget.average_bits={','.join(f'{b:g}' for b in budgets)}"
        check = [f"allocation.additivity={additivity}"] if method == "integer_program" else []
        found.append([*overrides, f"allocation={method}", allowed, *check, seed])
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The finished runs below a folder, with the budget that each was given."""
    budgets: dict[tuple[Any, ...], float] = {}
    for path in sorted(folder.glob("**/record.json")):
        facts = json.loads(path.read_text())
        if facts["status"] == "finished":
            asked = facts["allocation"].get("budgets", {})
            budgets[_key(facts["row"])] = asked.get("average_bits", facts["row"]["w_bits"])
    return [row | {"budget": budgets[_key(row)]} for row in collect(folder)]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["allocation"], row["seed"], row["config_hash"]


def table_of(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Runs by method and budget."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["allocation"], float(row["budget"])), []).append(row)
    return found


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each budget the accuracy of every method, and how often the programs beat greedy search and equal widths."""
    table, lines, wins = table_of(rows), [], dict.fromkeys(PROGRAMS, 0)
    budgets = sorted({budget for method, budget in table if method in PROGRAMS})
    for budget in budgets:
        means = {}
        for method in METHODS:
            spent = budget if method != "uniform" else float(math.floor(budget))
            if (method, spent) in table:
                means[method] = statistics.mean(float(row["top1"]) for row in table[method, spent])
        others = max((mean for method, mean in means.items() if method not in PROGRAMS), default=-1.0)
        for method in PROGRAMS:
            wins[method] += means.get(method, -1.0) > others
        lines.append(f"{budget:g} bits: " + ", ".join(f"{method} {mean:.2f}" for method, mean in means.items()))
    beaten = "beats greedy search and equal widths at"
    ran = [(method, won) for method, won in wins.items() if any(name == method for name, _ in table)]
    return [*lines, *(f"{method} {beaten} {won} of {len(budgets)} budgets" for method, won in ran)]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Accuracy against size, a line a method, bars from the least to the largest of the seeds."""
    figure = Figure(figsize=(6.0, 4.5), layout="constrained")
    axis = figure.subplots()
    for method in METHODS:
        runs = [own for (name, _), own in sorted(table_of(rows).items()) if name == method]
        points = []
        for own in runs:
            top1 = [float(row["top1"]) for row in own]
            mean = statistics.mean(top1)
            size = 100 * statistics.mean(float(row["size_fraction"]) for row in own)
            points.append((size, mean, mean - min(top1), max(top1) - mean))
        if points:
            size, mean, below, above = zip(*sorted(points), strict=True)
            axis.errorbar(size, mean, yerr=(below, above), fmt="o-", capsize=3, label=method)
    if rows:
        axis.axhline(float(rows[0]["float_top1"]), color="gray", linestyle="--", label="float")
    axis.set_xlabel("weights, per cent of float32")
    axis.set_ylabel("top-1 in per cent")
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def additivity_of(folder: Path) -> list[dict[str, Any]]:
    """Random networks of all runs that checked whether harm adds up; each seed's once, whatever its budget."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("**/additivity.csv")):
        facts = json.loads((path.parent / "record.json").read_text())
        if facts["status"] == "finished":
            with path.open(newline="") as file:
                found[facts["row"]["seed"]] = [{"seed": facts["row"]["seed"]} | row for row in csv.DictReader(file)]
    return [row for rows in found.values() for row in rows]


def main() -> None:
    """Run the sweeps, collect, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="benchmarks/results/pareto_<name>.csv and .png are written")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 3.5, 4.0, 5.0, 6.0], help="average bits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which of them")
    parser.add_argument("--additivity", type=int, default=20, help="random networks a seed")
    parser.add_argument("--collect", type=Path, help="folder of sweeps that have already run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    here = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, overrides = parser.parse_args(sys.argv[1:here]), sys.argv[here + 1 :]
    folder, failed = options.collect, 0
    if folder is None:
        folder = ROOT / "multirun" / f"pareto_{options.name}_{datetime.now(UTC):%Y-%m-%d_%H-%M-%S}"
        sweeps = commands(options.bits, options.seeds, overrides, options.additivity, options.methods)
        for number, arguments in enumerate(sweeps):
            command = [
                sys.executable,
                str(ROOT / "run.py"),
                "-m",
                *arguments,
                f"hydra.sweep.dir={folder / str(number)}",
            ]
            failed |= subprocess.run(command, cwd=ROOT, check=False).returncode
    rows = rows_of(folder)
    if not rows:
        raise SystemExit(f"no finished run below {folder}")
    write_csv(options.output / f"pareto_{options.name}.csv", rows)
    draw(rows, options.output / f"pareto_{options.name}.png")
    print("\n".join(summary(rows)))
    pairs = additivity_of(folder)
    if pairs:
        write_csv(options.output / f"pareto_{options.name}_additivity.csv", pairs)
        columns = ([float(pair[side]) for pair in pairs] for side in ("predicted", "measured"))
        print(f"harm predicted and measured, Spearman: {rank_correlation(*columns):.3f} of {len(pairs)} networks")
    sys.exit(failed)


if __name__ == "__main__":
    main()
