"""A sweep on a real Slurm of one node: arrays, cancelled, killed and requeued jobs, a drained node, Ctrl-C, DDP."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from run import run_job
from tests.cluster.pace import paced, where
from tests.cluster.sweeps import QUICK, call, output_of, place, record, same_student, started, until
from tests.configuration import composed

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

SCRIPT = Path(__file__).parent / "slurm.sh"
ON_SLURM = (
    "hydra/launcher=slurm_cpu",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
    "hydra.launcher.status_every_s=2",
    "hydra.sweep.dir=sweep",
)
DDP = ("trainer=ddp", "trainer.accelerator=cpu")


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def states() -> dict[str, str]:
    """State of each job that waits or runs."""
    lines = slurm("squeue", "-h", "-r", "-o", "%i %t").splitlines()
    return dict(line.split() for line in lines)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Start Slurm, and stop it; the name of its node."""
    if os.geteuid() != 0:
        pytest.skip("needs root to start Slurm")
    started = subprocess.run(
        [SCRIPT, "start"], env=os.environ | {"SLURM_TEST_CPUS": "6"}, capture_output=True, text=True, timeout=300
    )
    if started.returncode:
        pytest.skip(f"Slurm cannot be started here: {started.stderr.strip()}")
    before = os.environ["PATH"]
    os.environ["SLURM_CONF"] = "/run/calibrant-slurm/slurm.conf"
    os.environ["PATH"] = f"{SCRIPT.parent / 'bin'}:{before}"
    try:
        yield slurm("sinfo", "-h", "-o", "%n").strip()
    finally:
        subprocess.run([SCRIPT, "stop"], capture_output=True, timeout=120)
        os.environ["PATH"] = before
        del os.environ["SLURM_CONF"]


def jobs_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / ".submitit" / "jobs.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_outlives_what_happens_to_its_jobs(cluster: str, tmp_path: Path) -> None:
    sweep, settings = tmp_path / "sweep", (*QUICK, "reconstruction.iterations=8")
    with started(tmp_path, "-m", *settings, *ON_SLURM, "seed=0,1,2,3,4", paced(0.8)) as process:
        until(lambda: all(where(place(sweep, job))[1] >= 6 for job in range(5)))
        jobs = [row["slurm_id"] for row in jobs_of(sweep)]
        assert len({job.split("_")[0] for job in jobs}) == 1  # one array
        slurm("scontrol", "update", f"nodename={cluster}", "state=drain", "reason=test")
        slurm("scancel", "--signal=USR2", jobs[1])  # as before a time limit or a preemption
        slurm("scontrol", "requeue", jobs[2])  # as an administrator does, or Slurm when a node is lost
        slurm("scancel", jobs[3])
        os.kill(where(place(sweep, 4))[0], signal.SIGKILL)  # as the system does when memory is short
        until(lambda: states().keys() <= {jobs[0], jobs[1], jobs[2]} and states().get(jobs[1]) == "PD")
        assert record(place(sweep, 1))["status"] == "interrupted"
        until(lambda: states().get(jobs[2]) == "PD")
        slurm("scontrol", "update", f"nodename={cluster}", "state=resume")
        assert process.wait(180) != 0

        output = " ".join(output_of(tmp_path).split())
        assert f"job #3 ({jobs[3]}) ended as CANCELLED" in output
        assert f"job #4 ({jobs[4]}) ended as FAILED" in output
        for job in range(3):
            alone = tmp_path / f"alone{job}"
            metrics = run_job(composed([*settings, f"seed={job}"], alone))
            facts = record(place(sweep, job))
            assert (facts["status"], facts["metrics"]) == ("finished", metrics)
            assert same_student(place(sweep, job), alone)
            assert len(facts.get("earlier_stages", [])) == (job > 0)
        for job in (1, 2):
            log = Path(jobs_of(sweep)[job]["log"])
            text = log.read_text() + log.with_suffix(".out").read_text()
            assert f"resuming from {place(sweep, job)}/checkpoints/reconstruction.ckpt" in text


def test_ctrl_c_cancels_the_array(cluster: str, tmp_path: Path) -> None:
    with started(
        tmp_path, "-m", *QUICK, *ON_SLURM, "seed=0,1", "hydra.launcher.array_parallelism=1", paced(1.0)
    ) as process:
        until(lambda: "R" in states().values())
        assert len(states()) == 2  # of which one waits for the other
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
        until(lambda: not states())


def test_two_tasks_of_a_job_reconstruct_together(cluster: str, tmp_path: Path) -> None:
    two = ("hydra/launcher=slurm_ddp", "hydra.launcher.gpus_per_node=null", *ON_SLURM[1:])
    code, output = call(tmp_path, "-m", *QUICK, *two, *DDP, "seed=7")
    assert code == 0, output
    facts = record(place(tmp_path / "sweep", 0))
    assert (facts["status"], facts["config"]["seed"]) == ("finished", 7)
    assert facts["processes"] == {"reconstruction": 2}


def task_of(sweep: Path, number: int) -> int:
    """The process of a task of a sweep's one job: what srun has started, with the number that Slurm gave it."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        ours = str(sweep).encode() in command and b"submitit.core._submit" in command
        if ours and f"SLURM_PROCID={number}".encode() in environment.split(b"\0"):
            return int(folder.name)
    raise AssertionError(f"no task {number} in {sweep}")


def test_a_killed_task_ends_its_job_within_a_minute(cluster: str, tmp_path: Path) -> None:
    two = ("hydra/launcher=slurm_ddp", "hydra.launcher.gpus_per_node=null", *ON_SLURM[1:])
    sweep = tmp_path / "sweep"
    settings = (*QUICK, "reconstruction.iterations=1000", *DDP)
    with started(tmp_path, "-m", *settings, *two, "seed=7", paced(0.2)) as process:
        until(lambda: where(place(sweep, 0))[1] > 2)
        (job,) = jobs_of(sweep)
        assert job["folder"] == place(sweep, 0).name
        os.kill(task_of(sweep, 1), signal.SIGKILL)
        until(lambda: not states(), 60)  # a minute is the promise
        assert process.wait(60) != 0
        assert re.search(
            rf"job #0 \({job['slurm_id']}\) (ended as FAILED|failed)", " ".join(output_of(tmp_path).split())
        )
