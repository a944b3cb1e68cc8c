"""Jobs that cannot be done: refused by name before any work, and the record says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import wandb

from run import run_job
from tests.configuration import NO_IMAGES, SMALL, composed


def test_roundings_to_be_solved_name_the_reconstruction_they_need(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add reconstruction=closed_form"):
        run_job(composed([*SMALL, "weight=gptq"], tmp_path))


def test_nothing_can_be_reconstructed_without_images(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"reconstruction: expected none with calibration=none.*add reconstruction=none"
    ):
        run_job(composed([*NO_IMAGES, "calibration=none"], tmp_path))
    assert not (tmp_path / "student.safetensors").exists()


def test_missing_data_is_said_before_any_work(tmp_path: Path) -> None:
    cfg = composed([*SMALL, "data=cifar10", "~data.limit", "+data.limit=8"], tmp_path)
    with pytest.raises(ValueError, match="choose data that fits the model"):
        run_job(cfg)
    assert "images" not in json.loads((tmp_path / "record.json").read_text())["stages"]


def test_a_failed_job_still_finishes_wandb(tmp_path: Path) -> None:
    small = [argument for argument in SMALL if not argument.startswith("logger")]
    offline = ["logger=wandb", "logger.wandb.offline=true"]
    cfg = composed([*small, *offline, "bits.weight=1"], tmp_path)
    with pytest.raises(Exception, match=r"bits\.weight"):
        run_job(cfg)
    assert wandb.run is None
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_a_failing_job_says_why(tmp_path: Path) -> None:
    cfg = composed([*SMALL, "bits.weight=1"], tmp_path)
    with pytest.raises(Exception, match=r"bits\.weight.*got 1"):
        run_job(cfg)
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["status"] == "failed"
    assert "bits.weight" in facts["error"]


def test_a_job_that_cannot_even_open_says_so_in_its_record(tmp_path: Path) -> None:
    small = [option for option in SMALL if not option.startswith("calibration")]
    with pytest.raises(Exception, match=r"calibration\.count"):
        run_job(composed([*small, "calibration.count=0"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["status"] == "failed"
    assert "calibration.count" in facts["error"]


class Made(Exception):  # noqa: N818  not an error
    pass


def test_a_float_accuracy_that_is_not_the_stated_one_is_flagged_before_images_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise Made

    monkeypatch.setattr("run.calibration_images", stop)
    whole = [option for option in SMALL if not option.startswith("data.limit")]
    found = []
    for name in ("noise", "real", "noise"):  # nothing known; measured now; known
        folder = tmp_path / str(len(found))
        cfg = composed([*whole, f"calibration={name}", "model.stated_top1=99.0"], folder)
        cfg.paths.store = str(tmp_path / "store")
        with pytest.raises(Made):
            run_job(cfg)
        found.append(json.loads((folder / "record.json").read_text()))
    assert [len(facts["real_data"]) for facts in found] == [0, 1, 0]
    assert "warning" not in found[0]
    assert all("the model configuration states 99.00" in facts["warning"] for facts in found[1:])
