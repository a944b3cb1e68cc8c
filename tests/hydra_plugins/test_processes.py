"""A process a job: its command, its share of the threads; sweeps where one job fails or two share a synthesis."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from callbacks.sweep_plan import FAILURE
from hydra_plugins.calibrant_launchers._command import command_of, quoted
from hydra_plugins.calibrant_launchers._environment import changed, cores, divided
from hydra_plugins.calibrant_launchers._results import RESULT, SaveResult
from hydra_plugins.calibrant_launchers.processes import ProcessesLauncher
from tests.cluster.sweeps import call, place, record
from tests.configuration import SMALL


def test_the_command_has_the_job_and_nothing_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["hydra/launcher=processes", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=x", "hydra.verbose=true"]
    config: Any = OmegaConf.create({"hydra": {"overrides": {"hydra": own}}})
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", "--config-name", "mine", "-cd=there", "seed=0,1", *own])
    command = command_of(config, ["seed=1", "bits=w3a3"], Path("/a folder/3"), 3)
    assert command[0] == sys.executable
    words = command[command.index("--config-name") :]
    assert words[:6] == ["--config-name", "mine", "-cd=there", "hydra.verbose=true", "seed=1", "bits=w3a3"]
    parsed = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(words[3:])}
    assert parsed["hydra.run.dir"] == "/a folder/3"
    assert parsed["hydra.mode"] == "RUN"
    assert parsed["hydra.job.num"] == 3
    assert not any("launcher" in word or "sweep" in word for word in words[:-1])


@pytest.mark.parametrize("text", ["plain", "with space", 'a"b', "it's", "a=b,c", "0", "[x]", "back\\slash", "end\\"])
def test_a_path_stays_a_path(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"hydra.run.dir={quoted(text)}"])
    assert str(override.value()) == text


def test_cores_are_divided_and_a_smaller_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "hydra_plugins.calibrant_launchers._environment.cores"
    monkeypatch.setattr(name, lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert divided(2)["OMP_NUM_THREADS"] == "4"
    assert divided(20)["OMP_NUM_THREADS"] == "1"
    with changed({"OMP_NUM_THREADS": "3"}):
        assert divided(2)["OMP_NUM_THREADS"] == "3"
        assert divided(4)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in os.environ


def test_at_least_one_job_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"hydra\.launcher\.n_jobs: expected at least 1, got 0"):
        ProcessesLauncher(n_jobs=0)
    assert ProcessesLauncher(devices=[0, 1]).n_jobs == 2


class Unreadable(Exception):  # noqa: N818
    """Can be written but not read: its constructor wants more than its message."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def test_any_error_reaches_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    config: Any = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = Unreadable("this", "that")
    SaveResult().on_job_end(config, failed)
    status, value = pickle.loads((tmp_path / RESULT).read_bytes())
    assert (status, str(value)) == ("FAILED", "Unreadable: this that")
    (tmp_path / RESULT).unlink()
    (tmp_path / FAILURE).unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    SaveResult().on_job_end(config, failed)
    assert not list(tmp_path.iterdir())


def test_a_failing_job_fails_alone(tmp_path: Path) -> None:
    options = ("hydra/launcher=processes", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep")
    code, output = call(tmp_path, "-m", *SMALL, "calibration=noise", "bits.weight=1,4", *options)
    assert code != 0
    assert "bits.weight" in output
    assert record(place(tmp_path / "sweep", 0))["status"] == "failed"
    kept = json.loads((place(tmp_path / "sweep", 0) / FAILURE).read_text())
    assert "bits.weight" in kept["error"]
    assert "Traceback (most recent call last)" in kept["traceback"]
    assert "run.py" in kept["traceback"]  # where it was raised, not where the sweep read of it
    assert not (place(tmp_path / "sweep", 1) / FAILURE).exists()
    facts = record(place(tmp_path / "sweep", 1))
    assert facts["status"] == "finished"
    assert f"{max(1, min(cores() // 2, int(os.environ.get('OMP_NUM_THREADS', 99))))} threads" in facts["machine"]
    assert not list((tmp_path / "sweep").glob(f"*/{RESULT}"))


def test_a_job_that_starts_as_the_sweep_is_stopped_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = ProcessesLauncher(stop_s=1)

    def stopped_meanwhile(folder: Path, device: str | None) -> dict[str, str]:
        launcher._stop_all()
        return dict(os.environ)

    monkeypatch.setattr(launcher, "_environment", stopped_meanwhile)
    command = [sys.executable, "-c", "import pathlib, time; pathlib.Path('began').touch(); time.sleep(60)"]
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="job #0 was not started: the sweep was stopped"):
        launcher._wait(0, command, tmp_path, None)
    assert time.monotonic() - started < 30
    assert not (tmp_path / "began").exists()


def test_two_joblib_jobs_share_one_synthesis_and_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep")
    monkeypatch.setattr("tests.cluster.sweeps.THREADS", {})  # an OMP_NUM_THREADS would go before
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    code, output = call(tmp_path, "-m", *SMALL, "bits=w4a4,w3a3", *options)
    assert code == 0, output
    facts = [record(place(tmp_path / "sweep", job)) for job in (0, 1)]
    assert {each["images"]["digest"] for each in facts} == {facts[0]["images"]["digest"]}
    assert sorted(each["images"]["from_store"] for each in facts) == [False, True]
    share = max(1, cores() // 2)
    assert share < cores() or cores() == 1
    assert all(each["machine"].endswith(f", {share} threads") for each in facts)
