"""Dashboards of whole jobs: every logger has the same metrics, every job a run of its own, none changes a number."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from lightning_modules.saved_students import load_student_from
from run import run_job
from tests.callbacks.offline_runs import OfflineRun, read_runs
from tests.cluster.sweeps import place
from tests.command_line import call
from tests.configuration import ROOT, SMALL, composed

QUIET = [argument for argument in SMALL if not argument.startswith("logger")]
OFFLINE = [*QUIET, "logger=wandb", "logger.wandb.offline=true"]
BESIDE = {"step", "epoch"}  # what a logger adds of its own


def of_csv(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in csv.DictReader((folder / "csv" / "metrics.csv").read_text().splitlines()):
        for key, value in row.items():
            if value and key not in BESIDE:
                found.setdefault(key, []).append((int(row["step"]), float(value)))
    return found


def of_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    keys = [key for key in events.Tags()["scalars"] if key not in BESIDE]
    return {key: [(event.step, event.value) for event in events.Scalars(key)] for key in keys}


def of_wandb(run: OfflineRun) -> dict[str, list[tuple[int, float]]]:
    keys = {key for row in run.history for key, value in row.items() if isinstance(value, int | float)}
    return {key: run.series(key) for key in keys if "/" in key and key.split("/")[1] not in BESIDE}


def nearly(found: Mapping[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """Without what single precision, in which TensorBoard keeps numbers, cannot tell."""
    return {key: [(step, pytest.approx(value, rel=1e-6)) for step, value in rows] for key, rows in found.items()}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three jobs in one process, the second of which fails."""
    folder = tmp_path_factory.mktemp("sweep")
    small = [*QUIET, "trainer.log_every_n_steps=1", "logger=many", "tags=[mine]"]
    done = call(folder, "-m", *small, "bits.weight=4,1,3", "hydra.sweep.dir=study", "paths.store=store", "export=onnx")
    assert done.returncode != 0
    assert "bits.weight" in done.stdout + done.stderr
    return folder / "study"


@pytest.fixture
def runs(sweep: Path) -> list[OfflineRun]:
    """Of the jobs, in their order."""
    by_id = {run.id: run for run in read_runs(sweep / "wandb")}
    assert len(by_id) == 3
    return [by_id[json.loads((place(sweep, i) / "wandb_run.json").read_text())["id"]] for i in range(3)]


def test_every_job_has_its_own_run(sweep: Path, runs: list[OfflineRun]) -> None:
    assert len(runs) == len({run.id for run in runs}) == 3
    assert [run.exit_code for run in runs] == [0, 1, 0]
    for run, number, bits in zip(runs, (0, 1, 2), (4, 1, 3), strict=True):
        record = json.loads((place(sweep, number) / "record.json").read_text())
        assert run.config["bits"]["weight"] == bits
        for key in ("commit", "config_hash", "overrides"):
            assert run.config[key] == record[key]
        assert {key: run.config[key] for key in record["config"]} == record["config"]
        assert (run.project, run.group, run.job_type) == ("calibrant", "study", "fast")
        assert {"mine", "tiny", "brecq", f"W{bits}A4", "calibrant_fast", "adaround", "lsq"} <= set(run.tags)
    assert "bits.weight" in runs[1].summary["error"]


def test_the_viewer_of_wandb_reads_the_file(runs: list[OfflineRun]) -> None:
    (path,) = runs[0].folder.glob("run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    assert found["config"]["bits"]["weight"] == 4
    (top1,) = [value for _, value in runs[0].series("test/quantized/top1")]
    assert found["summary"]["test/quantized/top1"] == top1


def test_all_loggers_have_the_same_metrics(sweep: Path, runs: list[OfflineRun]) -> None:
    for number, run in ((0, runs[0]), (2, runs[2])):
        rows = of_csv(place(sweep, number))
        assert of_wandb(run) == nearly(rows)
        assert of_tensorboard(place(sweep, number)) == nearly(rows)
        assert {
            "reconstruction/loss",
            "reconstruction/layer1.0/error_hard",
            "test/quantized/top1",
            "size/bytes",
        } <= set(rows)
        metrics = json.loads((place(sweep, number) / "record.json").read_text())["metrics"]
        assert {key: rows[key][-1][1] for key in metrics} == metrics


def test_each_stage_counts_its_own_steps(runs: list[OfflineRun]) -> None:
    for stage in ("synthesis", "reconstruction", "test", "size"):
        assert runs[0].axes[f"{stage}/*"] == f"{stage}/step"
    assert [step for step, _ in runs[0].series("synthesis/loss")] == [0, 1]
    assert runs[0].series("reconstruction/loss")[0][0] == 0


def test_pictures_and_tables_are_those_of_the_folder(sweep: Path, runs: list[OfflineRun]) -> None:
    for number, run in ((0, runs[0]), (2, runs[2])):
        (((_, picture)),) = run.series("images/samples")
        assert run.file(picture).read_bytes() == (place(sweep, number) / "images.png").read_bytes()
        for table, file in (("reconstruction/units", "units.csv"), ("convert/quantizers", "quantizers.csv")):
            rows = list(csv.DictReader((place(sweep, number) / file).read_text().splitlines()))
            assert [{key: str(value) for key, value in row.items()} for row in run.table(table)] == [
                {key: str(known) for key, known in zip(row, map(value_of, row.values()), strict=True)} for row in rows
            ]


def value_of(cell: str) -> float | str | None:
    return float(cell) if cell.replace(".", "", 1).replace("e-", "", 1).isdigit() else cell or None


def test_artifacts_hold_what_loads_the_student_again(sweep: Path, runs: list[OfflineRun], tmp_path: Path) -> None:
    run = runs[0]
    digest = json.loads((place(sweep, 0) / "record.json").read_text())["images"]["digest"]
    images, student, export = (
        run.artifacts[name] for name in (f"images-{digest}", f"student-{run.id}", f"onnx-{run.id}")
    )
    assert [artifact.type for artifact in (images, student, export)] == ["calibration-images", "model", "model"]
    assert {entry.path.rpartition(".")[2] for entry in images.manifest.contents} == {"png", "safetensors"}
    for entry in student.manifest.contents:
        (tmp_path / entry.path).parent.mkdir(exist_ok=True)
        (tmp_path / entry.path).write_bytes(Path(entry.local_path).read_bytes())
    assert load_student_from(tmp_path).network is not None
    uses = [json.loads(artifact.metadata)["uses"] for artifact in (student, export)]
    assert uses == [[f"images-{digest}"], [f"images-{digest}", f"student-{run.id}"]]
    assert f"images-{digest}" not in runs[2].artifacts  # taken from the store, not made
    assert not [name for name in runs[1].artifacts if name.startswith("student")]


def test_a_job_resumed_outside_its_sweep_continues_its_run(
    sweep: Path, runs: list[OfflineRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep.parent)
    run_job(composed([f"resume={place(sweep, 2)}"], tmp_path))
    again = [run for run in read_runs(sweep) if run.id == runs[2].id]
    assert [run.group for run in again] == ["study", "study"]
    assert len({run.folder.parent for run in again}) == 1


def test_a_resumed_job_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    cfg = composed(OFFLINE, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("run.save_student", stop)
        with pytest.raises(KeyboardInterrupt):
            run_job(cfg)
    assert wandb.run is None
    cfg.resume = str(tmp_path)
    run_job(cfg)
    first, second = read_runs(tmp_path)
    assert first.id == second.id
    assert {first.exit_code, second.exit_code} == {0, 1}


def test_watching_changes_no_number(tmp_path: Path) -> None:
    watched = run_job(composed([*QUIET, "logger=many"], tmp_path / "watched"))
    alone = run_job(composed([*QUIET, "logger=none", "callbacks=none"], tmp_path / "alone"))
    assert watched == alone
    students = [load_file(tmp_path / name / "student.safetensors") for name in ("watched", "alone")]
    assert all(bool((students[0][key] == students[1][key]).all()) for key in students[1])


@pytest.mark.parametrize("place", ["wandb.init", "wandb.Run.log", "wandb.Run.log_artifact", "wandb.Run.finish"])
def test_no_failure_of_wandb_costs_the_job(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        metrics = run_job(composed([*OFFLINE, "calibration=noise", "reconstruction=none"], tmp_path))
    assert "test/quantized/top1" in metrics
    assert json.loads((tmp_path / "record.json").read_text())["status"] == "finished"
    assert len([record for record in caplog.records if record.name == "callbacks.wandb_run"]) == 1
    assert wandb.run is None


def test_an_agent_of_wandb_calls_run_py_with_overrides_that_compose(tmp_path: Path) -> None:
    study: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "sweep.yaml"))
    assert (ROOT / study["program"]).exists()
    assert study["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    for end in (0, -1):
        chosen = {key: ends(options)[end] for key, options in study["parameters"].items()}
        words = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
        command = [word for part in create_sweep_command(list(study["command"][3:])) for word in replaced(part, words)]
        assert command[0] == "logger=wandb"
        cfg = composed(command, tmp_path)
        assert cfg.logger.wandb.project == study["project"]
        for key, value in chosen.items():
            chosen_value = OmegaConf.select(cfg, key)
            assert chosen_value == value or key == "generator"
    metrics = run_job(composed([*SMALL, "calibration=noise", "reconstruction=none"], tmp_path / "run"))
    assert study["metric"]["name"] in metrics


def replaced(part: str, words: Mapping[str, Any]) -> list[str]:
    return words[part[2:-1]] if part.startswith("${") else [part]


def ends(options: Mapping[str, Any]) -> list[Any]:
    return options["values"] if "values" in options else [options["min"], options["max"]]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of wandb's own reading of that file
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_an_agent_fixed_stays_and_the_rest_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "config.yaml"
    given.write_text("wandb_version: 1\nbits.weight:\n  value: 4\n")
    for key, value in (("SWEEP_ID", "s1"), ("RUN_ID", "r1"), ("SWEEP_PARAM_PATH", str(given))):
        monkeypatch.setenv(f"WANDB_{key}", value)
    run_job(composed([*OFFLINE, "calibration=noise", "reconstruction=none"], tmp_path))
    wandb.teardown()  # its settings are those of an agent
    (run,) = read_runs(tmp_path)
    assert run.id == "r1"
    assert run.config["bits"]["weight"] == 4
