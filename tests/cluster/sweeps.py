"""Starting a sweep as a user does, and meeting its jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from callbacks.sweep_plan import read_plan
from tests.configuration import ROOT, SMALL

QUICK = (*SMALL, "calibration=noise", "reconstruction.iterations=4", "callbacks.checkpoint.every_seconds=1000")

THREADS = {"OMP_NUM_THREADS": "1"}  # of what is started


def environment_of(folder: Path) -> dict[str, str]:
    """Of what is started in `folder`: its own store, and trust in what the tests themselves put into saved runs."""
    environment = os.environ | THREADS | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    return environment | {"CALIBRANT_STORE": str(folder / "store"), "CALIBRANT_TRUST": "tests"}


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`python run.py <arguments>` in `folder`, its output in `output.log` there; killed at the latest on leaving."""
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    with (folder / "output.log").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment_of(folder), stdout=output, stderr=subprocess.STDOUT, text=True
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


def call(folder: Path, *arguments: str, seconds: float = 300) -> tuple[int, str]:
    """The same, waiting for its end: exit code and output."""
    with started(folder, *arguments) as process:
        return process.wait(seconds), output_of(folder)


def output_of(folder: Path) -> str:
    """What it has printed so far."""
    return (folder / "output.log").read_text()


def until(what: Callable[[], Any], seconds: float = 180) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def place(sweep: Path, number: int) -> Path:
    """The folder of a sweep's job, by its place in the sweep; a folder that is not there until the sweep is planned."""
    plan = read_plan(sweep)
    return sweep / (plan.jobs[number].folder if plan is not None else "unplanned")


def record(folder: Path) -> dict[str, Any]:
    """The record of a job."""
    return json.loads((folder / "record.json").read_text())


def same_student(a: Path, b: Path) -> bool:
    """Whether the students of two runs are bitwise the same."""
    first, second = (load_file(folder / "student.safetensors") for folder in (a, b))
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


def alive(processes: Sequence[int]) -> list[int]:
    """Those that run still; what has ended and waits to be collected does not count."""
    found = []
    for process in processes:
        status = Path(f"/proc/{process}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
            found.append(process)
    return found
