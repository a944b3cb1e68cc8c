"""Several processes: a job each in a sweep, two a job, and what becomes of the others when one is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.pace import paced, where
from tests.cluster.sweeps import QUICK, alive, call, environment_of, output_of, place, record, started, until
from tests.configuration import ROOT

DDP = ("trainer=ddp", "trainer.accelerator=cpu")


def led_by(process: int) -> list[int]:
    """Processes that share the sid of the process that leads them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == process:
            found.append(int(folder.name))
    return found


def with_parent(process: int) -> list[int]:
    """Processes that a process has started."""
    children: list[int] = []
    for thread in Path(f"/proc/{process}/task").iterdir():  # each has those that it started
        children += [int(child) for child in (thread / "children").read_text().split()]
    return children


@pytest.mark.slow
def test_two_processes_a_job_in_a_sweep(tmp_path: Path) -> None:
    code, output = call(tmp_path, "-m", *QUICK, *DDP, "seed=0,1", "hydra/launcher=processes", "hydra.sweep.dir=sweep")
    assert code == 0, output
    for seed in (0, 1):
        facts = record(place(tmp_path / "sweep", seed))
        assert (facts["status"], facts["config"]["seed"]) == ("finished", seed)
        assert facts["processes"] == {"reconstruction": 2}
        assert not (place(tmp_path / "sweep", seed) / "result.pkl").exists()


@pytest.mark.slow
def test_a_killed_process_ends_its_job_and_nothing_else(tmp_path: Path) -> None:
    options = ("hydra/launcher=processes", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep")
    with started(tmp_path, "-m", *QUICK, *DDP, "seed=0,1", *options, paced(0.2)) as process:
        until(lambda: where(place(tmp_path / "sweep", 0))[1] > 2)
        first = place(tmp_path / "sweep", 0)
        main = next(each for each in with_parent(process.pid) if where(first)[0] in led_by(each))
        members = led_by(main)
        assert len(members) == 2
        os.kill(next(each for each in members if each != main), signal.SIGKILL)
        until(lambda: not alive(members), 60)  # a minute is the promise
        assert process.wait(180) != 0
        assert re.search("job #0 (ended with signal|failed)", output_of(tmp_path))
        assert record(place(tmp_path / "sweep", 1))["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_stop_together_and_leave_no_orphan(end: signal.Signals, tmp_path: Path) -> None:
    with started(tmp_path, *QUICK, *DDP, "hydra.run.dir=run", paced(0.2)) as process:
        until(lambda: where(tmp_path / "run")[1] > 2)
        members = [process.pid, *with_parent(process.pid)]
        assert len(members) == 2
        process.send_signal(end)
        assert process.wait(30) == (143 if end == signal.SIGTERM else -9)
        until(lambda: not alive(members), 30)
        if end == signal.SIGTERM:
            assert record(tmp_path / "run")["status"] == "interrupted"
            code, output = call(tmp_path, f"resume={tmp_path / 'run'}")
            assert code == 0, output
            assert "resuming from" in (tmp_path / "run" / "run.log").read_text() + output
            assert record(tmp_path / "run")["status"] == "finished"


@pytest.mark.slow
def test_a_run_of_two_processes_is_verified_by_two(tmp_path: Path) -> None:
    code, output = call(tmp_path, *QUICK, *DDP, "hydra.run.dir=run")
    assert code == 0, output
    done = subprocess.run(
        [sys.executable, str(ROOT / "commands.py"), "verify", "run/record.json", "--output", "again"],
        cwd=tmp_path, env=environment_of(tmp_path), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every metric is equal, bitwise" in done.stdout
    first, second = (record(tmp_path / name) for name in ("run", "again"))
    assert first["processes"] == second["processes"] == {"reconstruction": 2}
    assert first["metrics"] == second["metrics"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "output.log", "run", "store"]
