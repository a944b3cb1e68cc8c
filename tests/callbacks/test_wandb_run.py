"""What W&B is told, and what happens when it cannot be: one warning, and the job goes on."""

from __future__ import annotations

import json
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only

from callbacks import wandb_access
from callbacks.wandb_content import Content, labels, number
from callbacks.wandb_run import IDENTITY, WandbRun, given_id
from tests.callbacks.offline_runs import read_runs
from tests.configuration import ROOT

FINISHED = {"status": "finished", "stages": {"images": {"seconds": 2.0, "peak_mib": 1.0}, "ranges": {"seconds": 0.5}}}


def logger(folder: Path, **options: Any) -> WandbRun:
    return WandbRun("calibrant", str(folder), **({"offline": True, "artifacts": False} | options))


def test_each_stage_has_its_own_steps(tmp_path: Path) -> None:
    run = logger(tmp_path)
    run.log_hyperparams({"bits": {"weight": 4}})
    for stage in ("synthesis", "reconstruction"):
        for step in (0, 1):
            run.log_metrics({f"{stage}/loss": 1.0 - step, "epoch": 3.0}, step)
    run.log_metrics({"reconstruction/layer1.0/error": 0.5}, 7)
    run.conclude(tmp_path, FINISHED)
    (found,) = read_runs(tmp_path)
    assert found.series("synthesis/loss") == found.series("reconstruction/loss") == [(0, 1.0), (1, 0.0)]
    assert found.series("reconstruction/layer1.0/error") == [(7, 0.5)]
    assert found.series("synthesis/epoch") == [(0, 3.0), (1, 3.0)]
    for stage in ("synthesis", "reconstruction"):
        assert found.axes[f"{stage}/*"] == f"{stage}/step"
    assert (found.config["bits"], found.exit_code) == ({"weight": 4}, 0)
    assert found.summary["seconds/total"] == 2.5


def test_two_runs_of_one_process_stay_apart_also_after_a_failure(tmp_path: Path) -> None:
    for name, status in (("a", "failed"), ("b", "finished")):
        run = logger(tmp_path / name)
        run.log_hyperparams({"name": name})
        run.log_metrics({"test/top1": 1.0}, 0)
        run.conclude(tmp_path / name, {"status": status, "error": "ValueError: no"})
    assert wandb.run is None
    first, second = (read_runs(tmp_path / name)[0] for name in ("a", "b"))
    assert [(run.config["name"], run.exit_code, len(run.history)) for run in (first, second)] == [
        ("a", 1, 1),
        ("b", 0, 1),
    ]
    assert first.summary["error"] == "ValueError: no"
    assert first.id != second.id


def test_what_goes_on_in_the_same_folder_continues_the_run(tmp_path: Path) -> None:
    for group in ("sweep", None):  # requeued by hand, outside the sweep
        run = logger(tmp_path, group=group)
        run.log_metrics({"test/top1": 1.0}, 0)
        run.conclude(tmp_path, FINISHED)
    ids = {found.id for found in read_runs(tmp_path)}
    assert ids == {json.loads((tmp_path / IDENTITY).read_text())["id"]}
    assert [found.group for found in read_runs(tmp_path)] == ["sweep", "sweep"]


def test_the_id_that_an_agent_chose_is_kept_but_jobs_of_a_sweep_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    assert given_id(tmp_path / "0") == "chosen"
    (tmp_path / "multirun.yaml").touch()
    assert given_id(tmp_path / "0") != given_id(tmp_path / "0") != "chosen"


def test_a_job_that_a_launcher_starts_as_a_run_of_its_own_belongs_to_its_sweep(tmp_path: Path) -> None:
    (tmp_path / "study" / "0").mkdir(parents=True)
    (tmp_path / "study" / "multirun.yaml").touch()
    run = logger(tmp_path / "study" / "0")
    run.describe({"config": CONFIG, "choices": CHOICES})
    run.log_metrics({"test/top1": 1.0}, 0)
    run.conclude(tmp_path, FINISHED)
    (found,) = read_runs(tmp_path / "study" / "wandb")
    assert found.group == "study"


def broken(*arguments: Any, **options: Any) -> None:
    raise OSError("disk full")


def unreachable(*arguments: Any, **options: Any) -> None:
    raise wandb.errors.UsageError("No API key configured")


def exercise(run: WandbRun, folder: Path) -> None:
    """All that a job asks of its logger."""
    (folder / "units.csv").write_text("unit,error_hard\nconv1,0.5\n")
    Image.new("RGB", (4, 4)).save(folder / "images.png")
    run.log_hyperparams({"seed": 0})
    for step in range(3):
        run.log_metrics({"test/top1": 1.0}, step)
    run.show(folder, FINISHED)
    run.log_image("images/samples", [str(folder / "images.png")], 0)
    run.experiment.log({"own": 1})
    run.conclude(folder, FINISHED)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our warnings."""
    return [record.message for record in caplog.records if record.name == "callbacks.wandb_run"]


@pytest.mark.parametrize("place", ["wandb.init", "wandb.Run.log", "wandb.Run.define_metric", "wandb.Run.finish"])
def test_whatever_fails_is_said_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(place, broken)
        run = logger(tmp_path)
        if place == "wandb.Run.finish":
            run.log_metrics({"test/top1": 1.0}, 0)
            run.conclude(tmp_path, FINISHED)
        else:
            exercise(run, tmp_path)
    (message,) = said(caplog)
    assert "disk full" in message


def test_a_folder_that_takes_nothing_costs_the_job_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    exercise(logger(tmp_path / "file" / "run"), tmp_path)
    assert len(said(caplog)) == 1


@pytest.mark.parametrize(("name", "content"), [("units.csv", ""), ("images.png", "no picture"), ("images.png", None)])
def test_what_cannot_be_read_is_left_out_and_the_run_goes_on(
    name: str, content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = logger(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    (tmp_path / "quantizers.csv").write_text("module,bits\nconv1,4\n")
    run.log_image("images/mine", [str(tmp_path / "images.png")], 0)
    run.show(tmp_path, FINISHED)
    run.log_metrics({"test/top1": 1.0}, 0)
    run.conclude(tmp_path, FINISHED)
    assert any(str(tmp_path / name) in record.message for record in caplog.records)
    (found,) = read_runs(tmp_path)
    assert found.series("test/top1") == [(0, 1.0)]
    assert found.table("convert/quantizers") == [{"module": "conv1", "bits": 4.0}]
    assert found.summary["seconds/total"] == 2.5


def test_after_a_failure_the_run_is_closed_and_the_next_job_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Content, "show", broken)
        exercise(logger(tmp_path), tmp_path)
    assert wandb.run is None
    (found,) = read_runs(tmp_path)
    assert found.exit_code == 0
    assert len(found.series("test/top1")) == 3
    assert not found.series("images/samples")
    (tmp_path / "next").mkdir()
    exercise(logger(tmp_path / "next"), tmp_path / "next")
    assert read_runs(tmp_path / "next")[0].id != found.id


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the machine's own settings say of W&B, but for a key that it does not have."""
    wandb.teardown()  # keeps the settings of the process
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    yield
    wandb.teardown()


@pytest.mark.usefixtures("online")
def test_a_run_that_cannot_be_opened_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = wandb.init
    monkeypatch.setattr("wandb.init", lambda **o: start(**o) if o.get("mode") == "offline" else unreachable())
    run = logger(tmp_path, offline=False)
    run.log_metrics({"test/top1": 1.0}, 0)
    run.conclude(tmp_path, FINISHED)
    (message,) = said(caplog)
    assert "cannot be reached" in message
    assert read_runs(tmp_path)[0].series("test/top1") == [(0, 1.0)]


WITHOUT_LOGIN = """
import logging, pathlib, sys
from callbacks.wandb_run import WandbRun
logging.basicConfig()
for name in "ab":
    run = WandbRun("calibrant", f"{sys.argv[1]}/{name}", artifacts=False)
    run.log_metrics({"test/top1": 1.0}, 0)
    run.conclude(pathlib.Path(sys.argv[1], name), {"status": "finished"})
"""


def test_without_a_login_nobody_is_asked_for_one(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "NETRC"))}
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_LOGIN, str(tmp_path)], cwd=tmp_path, env=environment, stdin=its_end,
        stdout=its_end, stderr=its_end, start_new_session=True,
    )  # fmt: skip
    os.close(its_end)
    printed = written_to(terminal, process, 60)
    assert process.returncode == 0, printed
    assert "Enter your choice" not in printed
    assert printed.count("W&B has no login here") == 2  # one a run
    for name in "ab":
        assert read_runs(tmp_path / name)[0].series("test/top1") == [(0, 1.0)]


def written_to(terminal: int, process: subprocess.Popen[bytes], seconds: float) -> str:
    """What a process writes to its terminal until it ends; it is killed when that takes long."""
    printed, end = b"", time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            with suppress(OSError):  # it has closed its end
                printed += os.read(terminal, 65536)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(terminal)
    return printed.decode(errors="replace")


def test_an_outage_is_waited_out_for_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = logger(tmp_path)
    assert run.experiment.settings.finish_timeout == 60
    run.conclude(tmp_path, FINISHED)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "7")
    wandb.teardown()
    run = logger(tmp_path / "chosen")
    assert run.experiment.settings.finish_timeout == 7
    run.conclude(tmp_path, FINISHED)
    wandb.teardown()


def test_a_job_that_is_stopped_does_not_wait_for_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()
    monkeypatch.setattr(wandb_access, "HAND_OVER_S", 0.5)
    run = logger(tmp_path)
    own = run.experiment
    with monkeypatch.context() as patch:
        patch.setattr("wandb.Run.finish", lambda self, exit_code: over.wait(60))
        started = time.monotonic()
        run.conclude(tmp_path, {"status": "interrupted", "stages": {}})
        assert time.monotonic() - started < 20
    (message,) = said(caplog)
    assert "kept for `wandb sync`" in message
    over.set()
    own.finish(exit_code=1)


def test_a_job_that_is_stopped_ends_its_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = logger(tmp_path)
    run.log_metrics({"test/top1": 1.0}, 0)
    run.conclude(tmp_path, {"status": "interrupted", "stages": {}})
    (found,) = read_runs(tmp_path)
    assert (found.exit_code, found.summary["status"]) == (1, "interrupted")
    assert not said(caplog)


def test_only_the_first_process_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    exercise(logger(tmp_path), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.png", "units.csv"]


def test_tables_and_pictures_are_shown_once(tmp_path: Path) -> None:
    path = tmp_path / "units.csv"
    run = logger(tmp_path)
    path.write_text("unit,phase,error_hard,reached\nconv1,joint,5e-05,\nlinear,joint,2,yes\n")
    run.show(tmp_path, FINISHED)
    run.show(tmp_path, FINISHED)
    run.conclude(tmp_path, FINISHED)
    (found,) = read_runs(tmp_path)
    assert found.table("reconstruction/units") == [
        {"unit": "conv1", "phase": "joint", "error_hard": 5e-05, "reached": None},
        {"unit": "linear", "phase": "joint", "error_hard": 2.0, "reached": "yes"},
    ]
    assert len(found.series("reconstruction/units")) == 1


@pytest.mark.parametrize(("cell", "value"), [("4", 4.0), ("1e-3", 0.001), ("", None), ("conv1", "conv1")])
def test_cells(cell: str, value: Any) -> None:
    assert number(cell) == value


class FakeRun:
    """Takes artifacts as `wandb.Run` does; offline it refuses those that are used, as wandb does."""

    def __init__(self, mode: str) -> None:
        self.id, self.settings, self.summary = "abc", SimpleNamespace(mode=mode), {}
        self.logged: list[Any] = []
        self.used: list[Any] = []

    def log_artifact(self, artifact: Any) -> None:
        self.logged.append(artifact)

    def use_artifact(self, artifact: Any) -> None:
        if self.settings.mode == "offline":
            raise TypeError("Cannot use artifact when in offline mode.")
        self.used.append(artifact)


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("from_store", [True, False])
def test_lineage(tmp_path: Path, mode: str, from_store: bool) -> None:
    (tmp_path / "abc.safetensors").write_bytes(b"images")
    for name in ("images.png", "allocation.yaml", "student.safetensors", "record.json", "model.onnx"):
        (tmp_path / name).write_bytes(b"some")
    images = {"origin": "synthetic", "count": 8, "digest": "d1", "from_store": from_store}
    facts = FINISHED | {"images": images, "stored_images": "abc.safetensors", "allocation": {"name": "greedy"}}
    facts["config"] = {"paths": {"store": str(tmp_path)}}
    run = FakeRun(mode)
    Content(True).conclude(run, tmp_path, facts)
    made = [] if from_store else ["images-d1"]
    assert [artifact.name for artifact in run.logged] == [*made, "allocation-abc", "student-abc", "onnx-abc"]
    assert [artifact.name for artifact in run.used] == (["images-d1"] if from_store and mode == "online" else [])
    student, export = run.logged[-2:]
    assert student.metadata["uses"] == ["images-d1", "allocation-abc"]
    assert export.metadata["uses"] == ["images-d1", "allocation-abc", "student-abc"]
    assert {"student.safetensors", "record.json", "allocation.yaml"} <= set(student.manifest.entries)
    if not from_store:
        assert {"images.png", "abc.safetensors"} == set(run.logged[0].manifest.entries)


def test_a_failed_run_leaves_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "student.safetensors").touch()
    run = FakeRun("online")
    Content(True).conclude(run, tmp_path, {"status": "failed"})
    assert not run.logged


CONFIG = {
    "name": "default",
    "calibration": {"_target_": "datamodules.calibration.SyntheticImages"},
    "model": {"name": "tiny"},
    "protocol": {"name": "brecq"},
    "bits": {"weight": 2, "activation": 4},
    "corrections": {"bias_tuning": {}},
}
CHOICES = {"generator": "dsg", "weight": "adaround", "reconstruction": "qdrop", "allocation": "uniform"}


@pytest.mark.parametrize(
    ("choices", "job_type"),
    [
        ({}, "qdrop"),
        ({"pipeline": "light"}, "light"),
        ({"distillation": "gdfq", "reconstruction": "none"}, "gdfq"),
        ({"reconstruction": "none"}, "adaround"),
    ],
)
def test_the_method_is_the_type_of_the_job(choices: dict[str, str], job_type: str) -> None:
    overrides = ["bits=w2a4", "logger=wandb", "paths.data=/somewhere"]
    found = labels({"config": CONFIG, "choices": CHOICES | choices, "overrides": overrides})
    assert found["job_type"] == job_type
    assert {"tiny", "brecq", "W2A4", "dsg", "bias_tuning"} <= set(found["tags"])
    assert not {"uniform", "none"} & set(found["tags"])
    assert found["name"] == "default bits=w2a4"


def test_images_that_are_not_synthetic_are_named_by_their_origin() -> None:
    config = CONFIG | {"calibration": {"_target_": "datamodules.calibration.RealImages"}}
    found = labels({"config": config, "choices": CHOICES | {"calibration": "real_1024"}})
    assert "real_1024" in found["tags"]
    assert "dsg" not in found["tags"]
