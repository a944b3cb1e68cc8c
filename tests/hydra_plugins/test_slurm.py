"""The Slurm launcher without Slurm: what is asked of it, dead jobs, Ctrl-C, a requeue in processes of this machine."""

from __future__ import annotations

import csv
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from submitit.slurm.slurm import SlurmExecutor

from callbacks.run_lease import at_work
from hydra_plugins.calibrant_launchers import _submitit
from hydra_plugins.calibrant_launchers.slurm import SlurmLauncher
from lightning_modules.processes import process_count, refuse_parallel_multirun
from run import run_job
from tests.cluster.pace import paced, where
from tests.cluster.sweeps import QUICK, call, output_of, place, record, same_student, started, until
from tests.configuration import CONF, ROOT, composed, options


def with_hydra(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def launcher_of(folder: Path, *overrides: str) -> SlurmLauncher:
    cfg = with_hydra("hydra/launcher=slurm", f"hydra.sweep.dir={folder}", "hydra.job.name=run", *overrides)
    given: Any = OmegaConf.to_container(cfg.hydra.launcher, resolve=False)
    del given["_target_"]
    launcher = SlurmLauncher(**given | {"submitit_folder": f"{folder}/.submitit/%j"})
    launcher.setup(hydra_context=object(), task_function=len, config=cfg)  # pyright: ignore[reportArgumentType]
    return launcher


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands as far as submitit calls them: every job has run out of memory at once."""
    folder = tmp_path / "bin"
    folder.mkdir()
    states = r'printf "JobID|State|NodeList\n7_0|OUT_OF_MEMORY|n1\n7_1|NODE_FAIL|n1\n7|TIMEOUT|n1\n"'
    for name, line in {
        "sbatch": f'cat "$1" > {tmp_path}/submitted; echo Submitted batch job 7',
        "srun": "exit 1",
        "sacct": states,
        "scancel": f'echo "$1" >> {tmp_path}/cancelled',
    }.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize("name", options("hydra/launcher"))
def test_every_launcher_composes_and_can_be_built(name: str) -> None:
    settings = with_hydra(f"hydra/launcher={name}").hydra.launcher
    given = {key: value for key, value in settings.items() if key not in ("_target_", "submitit_folder", "name")}
    get_class(settings._target_)(**given)
    assert (CONF / "hydra" / "launcher" / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("name", [name for name in options("hydra/launcher") if name.startswith("slurm")])
def test_submitit_knows_every_setting(name: str) -> None:
    ours = {"_target_", "cluster", "status_every_s", "submitit_folder", "max_num_timeout"}
    settings = set(with_hydra(f"hydra/launcher={name}").hydra.launcher) - ours
    assert settings <= SlurmExecutor._valid_parameters() | set(SlurmExecutor._equivalence_dict())


def test_a_job_is_submitted_as_asked_and_its_death_is_a_failed_result(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_submitit, "RESULT_WITHIN_S", 0)
    launcher = launcher_of(commands / "sweep", "hydra.launcher.partition=gpu", "hydra.launcher.array_parallelism=1")
    results = launcher.launch([["seed=0", "hydra.sweep.subdir='0-1a'"], ["seed=1"]], initial_job_idx=4)
    assert [result.status for result in results] == [JobStatus.FAILED] * 2
    assert [(result.overrides or [])[0] for result in results] == ["seed=0", "seed=1"]
    with pytest.raises(RuntimeError, match=r"job #4 \(7_0\) ended as OUT_OF_MEMORY; its log: .*7_0_0_log"):
        _ = results[0].return_value
    with pytest.raises(RuntimeError, match=r"job #5 \(7_1\) ended as NODE_FAIL"):
        _ = results[1].return_value
    asked = (commands / "submitted").read_text()
    for line in ("partition=gpu", "array=0-1%1", "gpus-per-node=1", "requeue", "signal=USR2@120", "time=240"):
        assert f"#SBATCH --{line}\n" in asked
    assert "mail" not in asked
    with (commands / "sweep" / ".submitit" / "jobs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["slurm_id"], row["overrides"], row["folder"]) for row in rows] == [
        ("4", "7_0", "seed=0", "0-1a"), ("5", "7_1", "seed=1", "5"),
    ]  # fmt: skip


def test_mail_is_asked_for_by_its_address(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_submitit, "RESULT_WITHIN_S", 0)
    launcher_of(commands / "sweep", "hydra.launcher.mail_user=me@here").launch([["seed=0"]], 0)
    asked = (commands / "submitted").read_text()
    assert "#SBATCH --mail-user=me@here\n" in asked
    assert "#SBATCH --mail-type=FAIL,TIME_LIMIT\n" in asked


def test_ctrl_c_cancels_every_job(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: _submitit.OneJob) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(_submitit.OneJob, "results", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launcher_of(commands / "sweep").launch([["seed=0"], ["seed=1"]], 0)
    assert (commands / "cancelled").read_text().split() == ["7_0", "7_1"]


def test_without_submitit_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hydra_plugins.calibrant_launchers as package

    monkeypatch.delattr(package, "_submitit")
    monkeypatch.setitem(sys.modules, "hydra_plugins.calibrant_launchers._submitit", None)
    with pytest.raises(ImportError, match=r"pip install calibrant\[cluster\]"):
        launcher_of(tmp_path)


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"hydra\.launcher\.cluster: expected one of .*got 'pbs'"):
        launcher_of(tmp_path, "hydra.launcher.cluster=pbs")
    with pytest.raises(ValueError, match=r"max_num_timeout: expected at least 1, .*got 0"):
        launcher_of(tmp_path, "hydra.launcher.max_num_timeout=0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="found no sbatch"):
        launcher_of(tmp_path).launch([["seed=0"]], 0)


def test_srun_ends_a_job_of_several_processes_with_the_first_that_is_killed(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_submitit, "RESULT_WITHIN_S", 0)
    launcher_of(commands / "sweep", "hydra/launcher=slurm_ddp").launch([["seed=0"]], 0)
    asked = (commands / "submitted").read_text()
    assert "#SBATCH --ntasks-per-node=2\n" in asked
    (srun,) = [line for line in asked.splitlines() if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1" in srun.split(" -m submitit")[0].split()


@pytest.mark.parametrize(("launcher", "tasks"), [("basic", 1), ("joblib", 1), ("slurm_local", 1), ("slurm_ddp", 2)])
def test_several_processes_a_job_only_where_each_is_started_as_itself(
    launcher: str, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = with_hydra("trainer=ddp", f"hydra/launcher={launcher}")
    with open_dict(cfg):
        cfg.hydra.mode = "MULTIRUN"
    monkeypatch.setenv("SLURM_NTASKS", str(tasks))
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.masked_copy(cfg, ["hydra"]))
    if tasks == 2:
        refuse_parallel_multirun(cfg)
        return
    message = rf"trainer\.devices: expected 1 .*launcher={launcher}, got 2.*Add hydra/launcher=processes"
    with pytest.raises(ValueError, match=message):
        refuse_parallel_multirun(cfg)


@pytest.mark.parametrize(
    ("settings", "gpus", "count"),
    [
        ("devices: 1", 4, 1),
        ("devices: [1]", 4, 1),
        ("devices: [0, 2]", 4, 2),
        ("devices: '0,2'", 4, 2),
        ("{devices: auto, accelerator: gpu}", 4, 4),
        ("{devices: auto, accelerator: auto}", 0, 1),
        ("{devices: -1, accelerator: cuda}", 3, 3),
        ("{devices: auto, accelerator: cpu}", 4, 1),
        ("{devices: 1, num_nodes: 2}", 0, 2),
    ],
)
def test_processes_are_counted_as_lightning_makes_them(
    settings: str, gpus: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    trainer = OmegaConf.create(settings)
    assert isinstance(trainer, DictConfig)
    assert process_count(trainer) == count


def test_devices_of_no_kind_are_named() -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices: expected a number, a list of GPUs, auto or -1, got 'two'"):
        process_count(OmegaConf.create({"devices": "two"}))


def test_one_chosen_gpu_is_taken_in_a_multirun(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = with_hydra("trainer=gpu", "trainer.devices=[1]")
    with open_dict(cfg):
        cfg.hydra.mode = "MULTIRUN"
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.masked_copy(cfg, ["hydra"]))
    refuse_parallel_multirun(cfg)
    cfg.trainer.devices = "auto"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"got auto, which is 2 processes a job"):
        refuse_parallel_multirun(cfg)


def test_sacct_is_answered_from_scontrol(tmp_path: Path) -> None:
    control = tmp_path / "scontrol"
    lines = (
        "JobId=8 ArrayJobId=7 ArrayTaskId=0 JobState=FAILED NodeList=n1",
        "JobId=7 ArrayJobId=7 ArrayTaskId=1-4%2 JobState=PENDING NodeList=",
    )
    control.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    control.chmod(0o755)
    shim = ROOT / "tests" / "cluster" / "bin" / "sacct"
    done = subprocess.run(
        [sys.executable, shim, "-o", "JobID,State,NodeList", "--parsable2", "-j", "7"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["JobID|State|NodeList", "7_0|FAILED|n1", "7_[1-4%2]|PENDING|"]


def test_a_job_whose_sweep_was_killed_keeps_its_folder_to_itself(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    arguments = ("-m", *QUICK, "seed=3", "hydra/launcher=slurm_local", "hydra.sweep.dir=sweep", paced(60))
    with started(tmp_path, *arguments) as process:
        until(lambda: where(place(sweep, 0))[1] >= 1)
        process.kill()
        process.wait()
    job = place(sweep, 0)
    worker = where(job)[0]
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    try:
        code, output = call(tmp_path, *arguments, "sweep.resume=true")
        assert code == 1
        assert f"there still are process {worker} on" in output
        assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file()} == before
    finally:
        os.kill(worker, signal.SIGKILL)
    until(lambda: not at_work([job], 0))
    assert not (job / "run.lock").exists()


def test_a_requeued_job_goes_on_to_the_result_of_an_undisturbed_one(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    arguments = ("-m", *QUICK, "seed=3", "hydra/launcher=slurm_local", "hydra.sweep.dir=sweep", paced(0.5))
    with started(tmp_path, *arguments) as process:
        until(lambda: where(place(sweep, 0))[1] >= 3)
        os.kill(where(place(sweep, 0))[0], signal.SIGUSR2)
        assert process.wait(120) == 0, output_of(tmp_path)
    metrics = run_job(composed([*QUICK, "seed=3"], tmp_path / "alone"))
    facts = record(place(sweep, 0))
    assert (facts["status"], facts["metrics"]) == ("finished", metrics)
    assert len(facts["earlier_stages"]) == 1
    assert same_student(place(sweep, 0), tmp_path / "alone")
