"""The command line: help, errors that help, sweeps with their table, dashboards that are closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.configuration import ROOT, SMALL


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_help_explains_itself(tmp_path: Path) -> None:
    text = call(tmp_path, "--help").stdout
    for word in ("python run.py", "generator: ", "protocol: ", "bits: ", "dsg", "w4a4", "resume="):
        assert word in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bits=w1a1", "w4a4"),  # Hydra lists the options there are
        ("reconstruction.itterations=5", "itterations"),
        ("bits.activation=40", "bits.activation"),
        ("model.architecture=resnet21", "resnet21"),
        ("data=cifar10", "choose data that fits the model"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, message: str) -> None:
    done = call(tmp_path, *SMALL, override)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


def test_sweep_ends_in_a_table_and_each_job_has_its_own_wandb_run(tmp_path: Path) -> None:
    small = [argument for argument in SMALL if not argument.startswith("logger")]
    done = call(
        tmp_path, "-m", *small, "seed=0,1", "logger=wandb", "logger.wandb.offline=true", "hydra.sweep.dir=sweep"
    )
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout
    folders = list((tmp_path / "sweep").glob("*/record.json"))
    assert len(folders) == 2
    assert len(list((tmp_path / "sweep" / "wandb").glob("offline-run-*/*.wandb"))) == 2


@pytest.mark.slow
def test_two_processes_reconstruct_together(tmp_path: Path) -> None:
    done = call(tmp_path, *SMALL, "trainer=ddp", "trainer.accelerator=cpu", "hydra.run.dir=shared")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "shared" / "record.json").read_text())
    assert facts["status"] == "finished"
    assert facts["config"]["trainer"]["devices"] == 2
    assert (tmp_path / "shared" / "student.safetensors").stat().st_size > 0
    assert done.stdout.count("files in ") == 1  # one of the two reports
