"""Runs that do not begin: a folder that is in use, a result that stands, `sweep.resume` where nothing heeds it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from omegaconf import DictConfig

from callbacks.run_lease import LOCK, run_lease
from lightning_modules.refusals import AlreadyFinishedError
from run import run_job
from tests.command_line import calls
from tests.configuration import SMALL, composed

QUICK = (*SMALL, "calibration=noise", "reconstruction=none", "weight=nearest", "activation=fixed")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_in_which_a_run_is_at_work_is_left_alone(tmp_path: Path) -> None:
    cfg = composed(QUICK, tmp_path)
    with run_lease(tmp_path).held(0):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* is in {tmp_path}; wait for it, or stop it"):
            run_job(cfg)
        assert contents(tmp_path) == before
    run_job(cfg)
    assert not (tmp_path / LOCK).exists()


def test_a_run_that_fails_leaves_no_lock(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share_reconstruction: expected 1"):
        run_job(composed([*SMALL, "share_reconstruction=2"], tmp_path))
    assert json.loads((tmp_path / "record.json").read_text())["status"] == "failed"
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "transformer-engine"])
def test_numbers_that_the_networks_cannot_have_are_refused(precision: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.precision: expected one of 32-true, .* got {precision}"):
        run_job(composed([*QUICK, f"trainer.precision={precision}"], tmp_path))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_job(composed(QUICK, folder))


def again(folder: Path, *others: str) -> DictConfig:
    cfg = composed([*QUICK, *others], folder.parent / "unused")
    cfg.paths.output, cfg.paths.store = str(folder), str(folder / "store")
    return cfg


def test_a_job_that_waited_in_a_queue_ends_where_its_result_stands(
    finished: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = finished
    before = contents(folder)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    with pytest.raises(AlreadyFinishedError, match="nothing is done") as found:
        run_job(again(folder))
    assert found.value.metrics == metrics
    assert contents(folder) == before


@pytest.mark.parametrize("other", ["seed=1", "export=onnx"])
def test_a_result_of_another_configuration_or_without_the_export_does_not_end_it(
    finished: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr("run.expect_possible", lambda job: (_ for _ in ()).throw(RuntimeError("it began")))
    folder = finished[0]
    record = (folder / "record.json").read_bytes()
    with pytest.raises(RuntimeError, match="it began"):
        run_job(again(folder, other))
    (folder / "record.json").write_bytes(record)


def test_the_export_of_a_finished_run_is_made_up_for(finished: tuple[Path, dict[str, float]]) -> None:
    folder, metrics = finished
    student = (folder / "student.safetensors").read_bytes()
    assert run_job(again(folder, "export=onnx", f"resume={folder}")) == metrics
    assert (folder / "model.onnx").exists()
    assert (folder / "student.safetensors").read_bytes() == student
    facts = json.loads((folder / "record.json").read_text())
    assert (facts["status"], facts["config"]["export"]["container"]) == ("finished", "auto")


def test_a_resume_that_nothing_heeds_is_refused(tmp_path: Path) -> None:
    single = ["sweep.resume=true"]
    basic = ["-m", "seed=0", "sweep.resume=true", "hydra/sweeper=basic"]
    optuna = ["-m", "bits.weight=range(2,4)", "sweep.resume=true", "hydra/sweeper=optuna"]
    found = calls(tmp_path, [[*line, *QUICK] for line in (single, basic, optuna)])
    assert all(done.returncode for done in found)
    assert "sweep.resume: expected a multirun, got a single run; add -m" in found[0].text
    assert "got basic, which cannot go on with a sweep" in found[1].text
    assert "got hydra/sweeper=optuna, which goes on with a search by itself" in found[2].text
    assert not list(tmp_path.rglob("record.json"))
