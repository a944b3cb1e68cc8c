"""Run a sweep and write its finished jobs to `benchmarks/results/<name>.csv`, one row a run.

    python benchmarks/table.py cifar10 -- experiment=cifar10_resnet20_dsg_w4a4 sweep=cifar10
    python benchmarks/table.py cifar10 --collect multirun/<folder>       rows of a sweep that has already run

What stands after `--` goes to `run.py`. Rows of the same settings and seed that the file already holds are replaced.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from callbacks.report import write_csv

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IDENTITY = (
    "network",
    "protocol",
    "w_bits",
    "a_bits",
    "images",
    "image_count",
    "pipeline",
    "allocation",
    "seed",
    "config_hash",
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def collect(folder: Path) -> list[dict[str, Any]]:
    """The rows of all finished runs below `folder`; failed ones are named on the standard error stream."""
    rows = []
    for path in sorted(folder.glob("**/record.json")):
        facts = json.loads(path.read_text())
        if facts["status"] == "finished":
            rows.append(facts["row"] | {"changes": changes(facts["overrides"])})
        else:
            print(f"left out: {path.parent.name}: {facts.get('error', facts['status'])}", file=sys.stderr)
    return rows


def changes(overrides: list[str]) -> str:
    """The single settings that a run changed in the options it chose, but for those that say where files are."""
    places = ("paths.", "logger.", "show.", "data.root", "hydra.")
    return " ".join(sorted(o for o in overrides if "." in o.split("=")[0] and not o.startswith(places)))


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`new` after those of `old` that are not measured again; columns that a row lacks stay empty."""

    def identity(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(key)) for key in IDENTITY)

    again = {identity(row) for row in new}
    kept = [row for row in old if identity(row) not in again]
    columns = list(dict.fromkeys(key for row in (*kept, *new) for key in row))
    return [{key: row.get(key, "") for key in columns} for row in (*kept, *new)]


def main() -> None:
    """Run the sweep, collect, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="benchmarks/results/<name>.csv is written")
    parser.add_argument("--collect", type=Path, help="folder of a sweep that has already run")
    parser.add_argument("overrides", nargs="*", help="arguments of run.py, after --")
    options = parser.parse_args()
    folder, failed = options.collect, 0
    if folder is None:
        folder = ROOT / "multirun" / f"{options.name}_{datetime.now(UTC):%Y-%m-%d_%H-%M-%S}"
        command = [sys.executable, str(ROOT / "run.py"), *options.overrides, f"hydra.sweep.dir={folder}"]
        failed = subprocess.run(command, cwd=ROOT, check=False).returncode
    rows = collect(folder)
    if not rows:
        raise SystemExit(f"no finished run below {folder}")
    path = RESULTS / f"{options.name}.csv"
    write_csv(path, merge(read_rows(path), rows))
    print(f"{len(rows)} rows -> {path.relative_to(ROOT)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
