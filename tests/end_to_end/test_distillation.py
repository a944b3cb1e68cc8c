"""Fine-tuning in the main job: in the place of reconstruction, recorded, and refused where it cannot work."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from run import run_job
from tests.cluster.sweeps import same_student
from tests.configuration import SMALL, composed
from tests.killing import Kill, killing

SHORT = [
    *(setting for setting in SMALL if "calibration" not in setting and "logger" not in setting),
    "weight=straight_through",
    "activation=ema",
    "distillation.epochs=3",
    "distillation.warmup=1",
    "distillation.steps=2",
    "distillation.generator.batch_size=4",
    "trainer.log_every_n_steps=1",
]


def job(folder: Path, *overrides: str) -> tuple[dict[str, float], dict[str, Any]]:
    metrics = run_job(composed([*SHORT, *overrides], folder))
    return metrics, json.loads((folder / "record.json").read_text())


def test_gdfq_needs_no_image_and_reports_what_it_did(tmp_path: Path) -> None:
    metrics, facts = job(tmp_path, "distillation=gdfq", "calibration=none", "reconstruction=none", "protocol=f8l8")
    assert 0 <= metrics["test/quantized/top1"] <= 100
    assert facts["data_free"]
    assert facts["distillation"]["student_steps"] == 4
    assert set(facts["stages"]) == {"teacher", "convert", "images", "ranges", "distill", "evaluation"}
    with Image.open(tmp_path / "distillation.png") as panel:
        assert panel.size[1] > panel.size[0] >= 8 * 28  # ten classes, eight images each
    assert [path.name for path in (tmp_path / "classes").iterdir()] == ["epoch_0003.png"]
    (log,) = tmp_path.glob("**/metrics.csv")
    with log.open() as file:
        columns = next(csv.reader(file))
    assert {"distillation/generator/alignment", "distillation/student/divergence"} <= set(columns)
    assert {"distillation/student/epoch_loss", "distillation/student/best_epoch"} <= set(columns)


def test_fdda_takes_a_few_labelled_images_and_names_missing_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = ["distillation=fdda", "calibration=real", "calibration.count=9", "reconstruction=none"]
    _, facts = job(tmp_path, *chosen, "corrections=bn_reestimation")
    assert not facts["data_free"]
    assert "no real image of 1 of 10 classes" in caplog.text
    assert [entry["correction"] for entry in facts["corrections"]] == ["bn_reestimation"]


@pytest.mark.parametrize("step", [1, 3])  # in the midst of the warm-up, and of the student's first epoch
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, step: int) -> None:
    chosen = ["distillation=fdda", "calibration=real", "calibration.count=10", "reconstruction=none"]
    chosen += ["callbacks.checkpoint.every_seconds=0", killing("distillation", step)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    metrics, _ = job(whole, *chosen)
    cfg = composed([*SHORT, *chosen], killed)
    Kill.armed = True
    with pytest.raises(InterruptedError):
        run_job(cfg)
    assert (killed / "checkpoints" / "distillation.ckpt").exists()
    cfg.resume = str(killed)
    assert run_job(cfg) == metrics
    assert same_student(whole, killed)


ADDING = [
    *("distillation=fdda_images", "calibration=real", "calibration.count=10", "distillation.added_images=6"),
    *("distillation.warmup=3", "weight=adaround", "activation=lsq"),
]


def test_class_aware_images_are_made_once_and_reconstructed_on(tmp_path: Path) -> None:
    metrics, facts = job(tmp_path / "first", *ADDING)
    assert 0 <= metrics["test/quantized/top1"] <= 100
    assert (facts["images"]["count"], facts["images"]["origin"], facts["images"]["added"]) == (16, "real", 6)
    assert (tmp_path / "first" / "units.csv").exists()
    assert (facts["row"]["image_count"], facts["row"]["images"]) == (16, "real+generated")
    assert not facts["images"]["added_from_store"]
    for others, found in (
        (["bits=w8a8", "weight=genie_m"], True),  # widths and methods of the student
        (["distillation.few_shot.alignment.central=0"], False),
        (["seed=1"], False),
    ):
        cfg = composed([*SHORT, *ADDING, *others], tmp_path / "_".join(others))
        cfg.paths.store = str(tmp_path / "first" / "store")
        run_job(cfg)
        facts_now = json.loads((tmp_path / "_".join(others) / "record.json").read_text())
        assert facts_now["images"]["added_from_store"] is found
        assert (facts_now["images"]["digest"] == facts["images"]["digest"]) is found
        assert ("distill" in facts_now["stages"]) is not found


def test_a_job_killed_after_its_generator_finds_what_that_made(tmp_path: Path) -> None:
    chosen = [*ADDING, "callbacks.checkpoint.every_seconds=0", killing("reconstruction", 1)]
    cfg = composed([*SHORT, *chosen], tmp_path)
    Kill.armed = True
    with pytest.raises(InterruptedError):
        run_job(cfg)
    drawn = (tmp_path / "distillation.png").stat().st_mtime_ns
    cfg.resume = str(tmp_path)
    metrics = run_job(cfg)
    assert (tmp_path / "distillation.png").stat().st_mtime_ns == drawn
    assert metrics == job(tmp_path / "whole", *ADDING)[0]


FEW = ("calibration=real", "calibration.count=10")


@pytest.mark.parametrize(
    ("chosen", "message", "stages"),
    [
        (("distillation=gdfq", "reconstruction=qdrop"), "distillation: expected none, or reconstruction=none", set()),
        (("distillation=gdfq", "distillation.warmup=3"), "added_images, warmup: expected .* got 0 and 3 of 3", set()),
        (
            ("distillation=gdfq", "distillation.epochs=0", "distillation.warmup=0"),
            "expected epochs and steps >= 1",
            set(),
        ),
        (("distillation=gdfq", "distillation.learn=[weight]"), "learn: expected some of", set()),
        (("distillation=gdfq", "distillation.optimizer.lr=-1"), "Invalid learning rate: -1", set()),
        (("distillation=fdda", *FEW, "+distillation.few_shot.untrusted_epochs=5"), "start the run anew", set()),
        (("distillation=gdfq", "distillation.warmup=7"), "no more epochs of warm-up than epochs", set()),
        (("distillation=fdda_images", *FEW, "reconstruction=fast"), "added_images, warmup: .* got 1024 and 1", set()),
        (("distillation=images", *FEW), "distillation.warmup: expected 0 where no", set()),
        (("distillation=fdda",), "calibration: expected real, .* got noise; choose calibration=real", set()),
        (("distillation=images", "distillation.warmup=0"), "got noise; .* distillation.loss.cross_entropy=0", set()),
        (
            ("distillation=images", "distillation.warmup=0", "calibration=none", "distillation.loss.cross_entropy=0"),
            "calibration: expected real, .* got none",
            set(),
        ),
        (("distillation=gdfq", "weight=adaround"), "learn: expected a rounding that trains", {"teacher", "convert"}),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, chosen: tuple[str, ...], message: str, stages: set[str]
) -> None:
    without = "distillation.generator" if "distillation=images" in chosen else "~"  # there is none to set anything of
    short = [setting for setting in SHORT if not setting.startswith(without)]
    cfg = composed([*short, "calibration=noise", "reconstruction=none", *chosen], tmp_path)
    with pytest.raises(ValueError, match=message):
        run_job(cfg)
    assert set(json.loads((tmp_path / "record.json").read_text())["stages"]) == stages


def test_no_fine_tuning_is_the_default() -> None:
    assert composed().distillation == {"epochs": 0}
