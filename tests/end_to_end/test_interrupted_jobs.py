"""Jobs that are killed, resumed, or gone on with: the same result as undisturbed ones, and nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file

from deployment.student_file import save_student
from lightning_modules.job import Job
from run import run_job
from tests.configuration import SMALL, composed
from tests.killing import Kill, killing
from tests.saved_students import same, student


@pytest.mark.parametrize(("stage", "step"), [("synthesis", 3), ("reconstruction", 1), ("reconstruction", 7)])
@pytest.mark.parametrize("reconstruction", ["qdrop", "brecq"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, stage: str, step: int, reconstruction: str) -> None:
    overrides = [
        *SMALL,
        f"reconstruction={reconstruction}",
        "reconstruction.iterations=4",
        "generator=zeroq",
        "generator.batch_size=4",
        "callbacks.checkpoint.every_seconds=0",
        killing(stage, step),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_job(composed(overrides, whole))
    cfg = composed(overrides, killed)
    Kill.armed = True
    with pytest.raises(InterruptedError):
        run_job(cfg)
    assert json.loads((killed / "record.json").read_text())["status"] == "failed"
    assert (killed / "checkpoints" / f"{stage}.ckpt").exists()
    cfg.resume = str(killed)
    run_job(cfg)
    assert same(student(whole), student(killed))
    assert json.loads((killed / "record.json").read_text())["row"]["images_from_store"] is False
    assert not list((killed / "checkpoints").iterdir())


class Steps(pl.Callback):
    """Counts the steps of each stage."""

    taken: ClassVar[dict[str, int]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        Steps.taken[pl_module.stage] = Steps.taken.get(pl_module.stage, 0) + 1


SHORT = [
    *SMALL,
    "generator=zeroq",
    "reconstruction.iterations=1",
    "callbacks.checkpoint.every_seconds=0",
    f"+callbacks.steps={{_target_: {__name__}.Steps}}",
]


def kill(*arguments: Any) -> None:
    """In place of what saves a result; targets, which come before any image, are only not stored."""
    if not any(isinstance(argument, dict) and "targets" in argument for argument in arguments):
        raise KeyboardInterrupt


def test_trained_images_outlive_a_kill_before_they_are_stored_and_a_store_that_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SHORT, "reconstruction=none"]
    digests = []
    for name, place in (("put", "synthesis.store.SampleStore.put"), ("full", "run.save_student"), ("whole", None)):
        folder = tmp_path / name
        cfg = composed(overrides, folder)
        if name == "full":
            (folder / "store").touch()  # a file where the folder should be
        if place is not None:
            with monkeypatch.context() as patch:
                patch.setattr(place, kill)
                with pytest.raises(KeyboardInterrupt):
                    run_job(cfg)
            cfg.resume = str(folder)
        Steps.taken = {}
        run_job(cfg)
        assert Steps.taken == ({} if place else {"synthesis": 2})
        assert not list((folder / "checkpoints").iterdir())
        digests.append(json.loads((folder / "record.json").read_text())["images"]["digest"])
    assert len(set(digests)) == 1


def test_a_reconstruction_outlives_a_kill_before_the_student_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, before = composed(SHORT, tmp_path), tmp_path / "before.safetensors"

    def save_elsewhere(student: torch.nn.Module, path: Path, identity: dict[str, str]) -> None:
        save_student(student, before, identity)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("run.save_student", save_elsewhere)
        with pytest.raises(KeyboardInterrupt):
            run_job(cfg)
    cfg.resume = str(tmp_path)
    Steps.taken = {}
    run_job(cfg)
    assert Steps.taken == {}
    assert not list((tmp_path / "checkpoints").iterdir())
    assert same(load_file(before), student(tmp_path))


def test_shared_synthesis_makes_the_same_images_and_goes_on_when_killed(tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        "generator=zeroq",
        "generator.batch_size=4",
        "reconstruction=none",
        "callbacks.checkpoint.every_seconds=0",
        killing("synthesis_1", 1),
    ]
    run_job(composed(overrides, tmp_path / "alone"))
    cfg = composed([*overrides, "share_synthesis=true"], tmp_path / "shared")
    Kill.armed = True
    with pytest.raises(InterruptedError):
        run_job(cfg)
    assert (tmp_path / "shared" / "checkpoints" / "synthesis_1.ckpt").exists()
    cfg.resume = str(tmp_path / "shared")
    run_job(cfg)
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in ("alone", "shared")]
    assert records[0]["images"]["digest"] == records[1]["images"]["digest"]
    assert records[0]["config_hash"] == records[1]["config_hash"]


def test_saved_student_is_scored_without_calibrating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = composed(SMALL, tmp_path)
    first = run_job(cfg)
    monkeypatch.setattr(Job, "fit", None)
    before = (tmp_path / "record.json").read_bytes()
    scored = composed([*SMALL, f"evaluate={tmp_path}"], tmp_path / "scored")
    again = run_job(scored)
    assert again == {key: value for key, value in first.items() if "nearest" not in key}
    assert (tmp_path / "record.json").read_bytes() == before  # the finished run stays as it was
    images = [json.loads((folder / "record.json").read_text())["images"] for folder in (tmp_path, tmp_path / "scored")]
    assert images[0] == images[1]
    captions = " ".join(capsys.readouterr().out.split())
    assert captions.count("8 synthetic calibration images") == 2


def test_a_run_that_only_went_on_with_another_is_not_taken_for_it(tmp_path: Path) -> None:
    run_job(composed(SMALL, tmp_path / "first"))
    run_job(composed([*SMALL, f"evaluate={tmp_path / 'first'}"], tmp_path / "second"))
    third = composed([*SMALL, f"evaluate={tmp_path / 'second'}"], tmp_path / "third")
    with pytest.raises(ValueError, match=r"name that one: evaluate=.*first"):
        run_job(third)


def test_a_resumed_run_keeps_its_own_labels(tmp_path: Path) -> None:
    cfg = composed(SMALL, tmp_path)
    run_job(cfg)
    record = tmp_path / "record.json"
    facts = json.loads(record.read_text()) | {"choices": {"reconstruction": "brecq"}, "overrides": ["bits=w3a3"]}
    record.write_text(json.dumps(facts))
    run_job(composed([*SMALL, f"resume={tmp_path}"], tmp_path / "new"))
    again = json.loads(record.read_text())
    assert again["row"]["pipeline"] == "brecq"
    assert again["overrides"] == ["bits=w3a3"]
    assert again["row"]["seconds"] > facts["row"]["seconds"]
    assert "reconstruct" not in again["stages"]  # the student was there already
    assert again["metrics"] == facts["metrics"]


def test_resume_needs_a_run(tmp_path: Path) -> None:
    cfg = composed([*SMALL, f"resume={tmp_path / 'nothing'}"], tmp_path / "x")
    with pytest.raises(ValueError, match="expected the folder of an earlier run"):
        run_job(cfg)
