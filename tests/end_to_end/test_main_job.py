"""The main job from configuration to record: what it leaves, what it never touches, what changes no number."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.job import Job
from run import run_job
from tests.configuration import NO_IMAGES, SMALL, choosing, composed
from tests.saved_students import same, student


def test_leaves_record_student_images_and_tables(tmp_path: Path) -> None:
    metrics = run_job(composed(SMALL, tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["status"] == "finished"
    assert facts["metrics"] == metrics
    assert set(facts["stages"]) == {"teacher", "convert", "images", "ranges", "reconstruct", "evaluation"}
    assert facts["row"]["protocol"] == "brecq"
    assert len(facts["teacher"]["weights_hash"]) == 16
    for name in ("images.png", "student.safetensors", "quantizers.csv", "units.csv"):
        assert (tmp_path / name).stat().st_size > 0
    assert not list(tmp_path.glob("**/*.tmp"))


def test_data_free_run_opens_real_images_only_to_be_scored(tmp_path: Path) -> None:
    run_job(composed(SMALL, tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["data_free"] is True
    assert [entry["stage"] for entry in facts["real_data"]] == ["evaluation"]
    assert facts["images"]["origin"] == "synthetic"


def test_real_images_are_listed(tmp_path: Path) -> None:
    run_job(composed([*SMALL, "calibration=real"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["data_free"] is False
    assert [entry["stage"] for entry in facts["real_data"]] == ["evaluation", "calibration"]
    assert list(facts["stages"])[:3] == ["teacher", "convert", "float"]  # measured before any work is done
    assert len(facts["images"]["files"]) == 8


def test_roundings_in_closed_form(tmp_path: Path) -> None:
    metrics = run_job(composed([*SMALL, *choosing("gptq"), "activation=fixed"], tmp_path))
    rows = list(csv.DictReader((tmp_path / "units.csv").read_text().splitlines()))
    assert rows
    assert all(row["phase"] == "closed_form" for row in rows)
    assert sum(float(row["error_hard"]) for row in rows) < sum(float(row["error_nearest"]) for row in rows)
    assert {"test/float/top1", "test/nearest/top1", "test/quantized/top1"} <= set(metrics)


@pytest.mark.parametrize("calibration", ["none", "none_aciq"])
def test_without_any_image_ranges_come_from_moments(tmp_path: Path, calibration: str) -> None:
    run_job(composed([*NO_IMAGES, f"calibration={calibration}", "reconstruction=none"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["data_free"] is True
    assert [entry["stage"] for entry in facts["real_data"]] == ["evaluation"]
    assert (facts["row"]["images"], facts["row"]["image_count"]) == ("none", 0)
    scales = [value for key, value in student(tmp_path).items() if "activation_sites" in key and key.endswith("scale")]
    assert scales
    assert all(float(scale) > 0 and float(scale) != 1 for scale in scales)


@pytest.mark.parametrize("calibration", ["noise", "real"])
def test_float_answers_from_the_store_give_the_same_bits(tmp_path: Path, calibration: str) -> None:
    results = []
    for name in ("measured", "known"):
        cfg = composed([*SMALL, f"calibration={calibration}"], tmp_path / name)
        cfg.paths.store = str(tmp_path / "store")
        results.append((run_job(cfg), json.loads((tmp_path / name / "record.json").read_text())))
    assert results[0][0] == results[1][0]
    assert [facts["float_from_store"] for _, facts in results] == [False, True]
    opened = [sorted(facts["real_data"], key=lambda entry: entry["stage"]) for _, facts in results]
    assert opened[0] == opened[1]  # in another order with real images: known, the accuracy is not measured first
    assert same(student(tmp_path / "measured"), student(tmp_path / "known"))


def test_targets_are_measured_once_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*SMALL, "generator=dsg", "generator.slack.images=8"]
    first, again = tmp_path / "first", tmp_path / "again"
    run_job(composed(overrides, first))
    assert (first / "targets.png").stat().st_size > 0
    monkeypatch.setattr("synthesis.targets.Slack.targets", lambda *arguments: pytest.fail("measured again"))
    cfg = composed([*overrides, "generator.steps=3"], again)  # other images, the same targets
    with open_dict(cfg):
        cfg.paths.store = str(first / "store")
    run_job(cfg)


def test_only_the_main_process_draws_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    overrides = [*SMALL, "generator=dsg", "generator.slack.images=8", "reconstruction=none"]
    assert run_job(composed(overrides, tmp_path)) == {}
    assert not list(tmp_path.glob("*.png"))


def test_images_are_synthesised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[str] = []
    fit = Job.fit

    def counting(self: Job, module: Any, *args: Any) -> None:
        fitted.append(module.stage)
        fit(self, module, *args)

    monkeypatch.setattr(Job, "fit", counting)
    for bits in ("w4a4", "w3a3"):
        run_job(composed([*SMALL, f"bits={bits}", f"+paths.unused={bits}"], tmp_path))
    assert fitted == ["synthesis", "reconstruction", "reconstruction"]


def test_a_shared_reconstruction_gives_the_same_student_and_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SMALL, "weight=adaquant", "reconstruction=adaquant_parallel", "reconstruction.batch_size=4"]
    run_job(composed(overrides, tmp_path / "alone"))
    fitted: list[str] = []
    fit = Job.fit
    monkeypatch.setattr(Job, "fit", lambda *arguments: (fitted.append(arguments[1].stage), fit(*arguments)))
    for name in ("shared", "again"):
        cfg = composed([*overrides, "share_reconstruction=2"], tmp_path / name)
        with open_dict(cfg):
            cfg.paths.store = str(tmp_path / "alone" / "store")
        run_job(cfg)
        assert same(student(tmp_path / name), student(tmp_path / "alone"))
    assert fitted == ["reconstruction_0", "reconstruction_1"]


def test_observers_change_no_number(tmp_path: Path) -> None:
    watched, alone = tmp_path / "watched", tmp_path / "alone"
    for folder, extra in ((watched, ["logger=csv"]), (alone, ["callbacks=none"])):
        cfg = composed([*SMALL, *extra], folder)
        if extra == ["logger=csv"]:
            cfg.callbacks.checkpoint.every_seconds = 0
        run_job(cfg)
    assert same(student(watched), student(alone))
    assert (watched / "csv" / "metrics.csv").exists()


def test_settings_that_change_no_number_do_not_change_the_hash(tmp_path: Path) -> None:
    hashes = []
    for name, extra in (("a", "logger=none"), ("b", "logger=csv"), ("c", "seed=1")):
        run_job(composed([*SMALL, "calibration=noise", "reconstruction=none", extra], tmp_path / name))
        hashes.append(json.loads((tmp_path / name / "record.json").read_text())["config_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_where_the_files_lie_does_not_change_the_hash(tmp_path: Path) -> None:
    hashes = []
    for place in ("a", "b"):  # a configuration with places in its options: the checkpoint, the folder of the images
        cfg = composed(["model=cifar10_resnet20", "data=cifar10", "calibration=real"], tmp_path / place)
        cfg.paths.data = str(tmp_path / place / "data")
        with pytest.raises(Exception, match=r"cifar10_resnet20\.pth"):
            run_job(cfg)
        hashes.append(json.loads((tmp_path / place / "record.json").read_text())["config_hash"])
    assert hashes[0] == hashes[1]


def test_tensorboard_carries_the_metrics(tmp_path: Path) -> None:
    small = [argument for argument in SMALL if not argument.startswith("logger")]
    metrics = run_job(composed([*small, "logger=tensorboard", "calibration=noise"], tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("test/quantized/top1")
    assert event.value == pytest.approx(metrics["test/quantized/top1"])


def test_the_row_says_whether_another_run_made_the_images(tmp_path: Path) -> None:
    rows = []
    for name, extra in (("a", []), ("b", ["bits=w3a3"]), ("c", ["calibration=noise"]), ("d", ["generator=noise"])):
        cfg = composed([*SMALL, *extra, "reconstruction=none"], tmp_path / name)
        cfg.paths.store = str(tmp_path / "store")
        run_job(cfg)
        rows.append(json.loads((tmp_path / name / "record.json").read_text())["row"])
    assert [row["images_from_store"] for row in rows] == [False, True, False, False]
    assert [row["generator_steps"] for row in rows] == [2, 2, None, 0]


def test_configuration_is_in_the_record(tmp_path: Path) -> None:
    cfg: DictConfig = composed(SMALL, tmp_path)
    run_job(cfg)
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["config"] == OmegaConf.to_container(cfg, resolve=True)
