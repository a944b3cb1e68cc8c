"""What a sweep costs beyond its jobs: 12 jobs that need no new images, against 12 times one of them.

python -m benchmarks.sweep_overhead                     prints the ratio and adds a row to results/sweep_overhead.csv
python -m benchmarks.sweep_overhead -- model=tiny       another job

The images and the float network's answers are in the store before anything is timed. `alone` is the wall time of one
job in a process of its own, as anyone would start it; `sweep` that of all of them, report included; `stages` what the
jobs themselves say they worked. In turns, medians, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.table import RESULTS, ROOT, read_rows
from callbacks.report import write_csv
from callbacks.run_record import commit, machine

OUTPUT = RESULTS / "sweep_overhead.csv"
JOBS = 12
ALLOWED = 1.2
SWEPT = ["bits.weight=2,3,4,5,6,8", "bits.activation=4,8"]  # 12 jobs of the same images


def timed(*arguments: str, folder: Path, store: Path) -> float:
    """Wall seconds of a call of run.py.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    environment = os.environ | {"CALIBRANT_STORE": str(store), "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def worked(folder: Path) -> float:
    """Seconds that the jobs below a folder spent in their stages."""
    records = [json.loads(path.read_text()) for path in folder.glob("**/record.json")]
    return sum(stage["seconds"] for record in records for stage in record["stages"].values())


def measure(job: list[str], rounds: int) -> dict[str, float]:
    """Medians over rounds of a single job and of the sweep, one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), Path(name) / "store"
        timed(*job, "hydra.run.dir=first", folder=folder, store=store)  # makes the images
        found: dict[str, list[float]] = {"alone": [], "sweep": [], "stages": []}
        for turn in range(rounds):
            found["alone"].append(timed(*job, f"hydra.run.dir=alone{turn}", folder=folder, store=store))
            sweep = f"sweep{turn}"
            found["sweep"].append(timed("-m", *job, *SWEPT, f"hydra.sweep.dir={sweep}", folder=folder, store=store))
            found["stages"].append(worked(folder / sweep))
    return {key: statistics.median(values) for key, values in found.items()}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("job", nargs="*", help="overrides, after --")
    given = parser.parse_args()
    found = measure(given.job, given.rounds)
    ratio = found["sweep"] / (JOBS * found["alone"])
    row = {
        "job": " ".join(given.job) or "the embedded example",
        "jobs": JOBS,
        "rounds": given.rounds,
        **{f"{key}_seconds": round(value, 2) for key, value in found.items()},
        "ratio": round(ratio, 3),
        "over_stages": round(found["sweep"] / found["stages"], 3),
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_csv(given.output, [*read_rows(given.output), row])
    for key, value in row.items():
        print(f"{key:>16}: {value}")
    print(f"{JOBS} jobs took {ratio:.2f} times {JOBS} single ones; at most {ALLOWED} is promised")


if __name__ == "__main__":
    main()
