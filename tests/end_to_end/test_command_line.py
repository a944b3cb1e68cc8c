"""The command line: help, errors that help, sweeps with their table, dashboards that are closed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import Done, call, calls
from tests.configuration import SMALL

MISTAKES = {  # and a part of what is said about them
    "bits=w1a1": "w4a4",  # Hydra lists the options there are
    "reconstruction.itterations=5": "itterations",
    "bits.activation=40": "bits.activation",
    "model.architecture=resnet21": "resnet21",
    "data=cifar10": "choose data that fits the model",
}


def test_help_explains_itself(tmp_path: Path) -> None:
    text = call(tmp_path, "--help").stdout
    for word in ("python run.py", "generator: ", "protocol: ", "bits: ", "dsg", "w4a4", "resume="):
        assert word in text


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    found = calls(tmp_path_factory.mktemp("mistakes"), [[*SMALL, override] for override in MISTAKES])
    return dict(zip(MISTAKES, found, strict=True))


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_named(mistaken: dict[str, Done], override: str) -> None:
    assert mistaken[override].returncode != 0
    assert MISTAKES[override] in mistaken[override].text


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
