"""Corrections in the main job: composed by name, recorded, in the student file, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from lightning_modules.corrections import Corrections
from lightning_modules.job import Job
from run import run_job
from tests.configuration import SMALL, composed
from tests.killing import Kill, killing
from tests.saved_students import student

ALL = "[equalization,bias_absorption,outlier_splitting,bn_reestimation,bias_correction,bias_tuning,network_polish]"
SHORT = ("corrections.bias_tuning.steps=2", "corrections.network_polish.steps=3")
NOISE = (*SMALL, "calibration=noise", "weight=nearest_minmax", "data.limit=16")


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def test_steps_are_recorded_in_their_order_and_the_student_reloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [*NOISE, "reconstruction=none", f"corrections={ALL}", *SHORT]
    metrics = run_job(composed(chosen, tmp_path))
    facts = facts_of(tmp_path)
    names = ALL.strip("[]").split(",")
    assert [entry["correction"] for entry in facts["corrections"]] == names
    assert facts["row"]["corrections"] == "+".join(names)
    assert "corrections" in facts["stages"]
    assert metrics["test/nearest/kl"] != metrics["test/quantized/kl"]
    monkeypatch.setattr(Job, "fit", None)
    again = run_job(composed([*chosen, f"evaluate={tmp_path}"], tmp_path / "scored"))
    assert again == {key: value for key, value in metrics.items() if "nearest" not in key}


def test_order_is_the_users(tmp_path: Path) -> None:
    chosen = "corrections=[bias_correction,bn_reestimation]"
    run_job(composed([*NOISE, "reconstruction=none", chosen], tmp_path))
    assert [e["correction"] for e in facts_of(tmp_path)["corrections"]] == ["bias_correction", "bn_reestimation"]


@pytest.mark.parametrize(
    ("chosen", "warns"),
    [
        ("[bn_reestimation,bias_correction]", True),
        ("[bias_correction,bn_reestimation]", False),
        ("[bn_reestimation_reference,bias_correction]", False),
        ("light", False),
    ],
)
def test_a_correction_that_undoes_another_is_warned_of(
    chosen: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = composed([f"corrections={chosen}"], tmp_path)
    Corrections(instantiate(cfg.corrections, _convert_="all")).warn_of_order()
    assert ("set corrections.bias_correction.layers=without_batch_norm" in caplog.text) == warns


def test_without_corrections_nothing_changes(tmp_path: Path) -> None:
    run_job(composed([*NOISE, "reconstruction=none"], tmp_path))
    facts = facts_of(tmp_path)
    assert facts["row"]["corrections"] == "none"
    assert facts["corrections"] == []
    assert "corrections" not in facts["stages"]


def test_light_brings_the_outputs_of_an_unreconstructed_student_closer(tmp_path: Path) -> None:
    chosen = [*SMALL, "calibration=real", "calibration.count=64", "reconstruction=none", "bits=w2a4"]
    metrics = run_job(composed([*chosen, "corrections=light", "weight=nearest_minmax"], tmp_path))
    assert metrics["test/quantized/kl"] < 0.7 * metrics["test/nearest/kl"]


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [
        *SMALL,
        "calibration=noise",
        "data.limit=16",
        "corrections=[equalization,bn_reestimation,bias_tuning,network_polish]",
        *SHORT,
        "callbacks.checkpoint.every_seconds=0",
        killing("network_polish", 2),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_job(composed(overrides, whole))
    cfg = composed(overrides, killed)
    Kill.armed = True
    with pytest.raises(InterruptedError):
        run_job(cfg)
    assert (killed / "checkpoints" / "network_polish.ckpt").exists()
    fitted: list[str] = []
    fit = Job.fit
    monkeypatch.setattr(Job, "fit", lambda self, module, *args: (fitted.append(module.stage), fit(self, module, *args)))
    cfg.resume = str(killed)
    run_job(cfg)
    assert fitted == ["bias_tuning", "network_polish"]  # reconstruction was done before the run was killed
    ours, theirs = student(whole), student(killed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not list((killed / "checkpoints").iterdir())
    assert not (killed / "reconstructed.safetensors").exists()
    monkeypatch.setenv("CALIBRANT_TRUST", "tests")  # the saved configuration names `Kill`
    run_job(composed([*NOISE, f"resume={killed}"], tmp_path / "new"))  # the student is there already
    assert facts_of(killed)["corrections"] == facts_of(whole)["corrections"]


POWERS = ("protocol=onnxruntime", "protocol.power_of_two=true", "activation=fixed")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (("corrections=light", "weight.channel_axis=null"), r"weight\.channel_axis=0, or leave out BN re-estimation"),
        (("corrections=bn_reestimation", *POWERS), r"protocol\.power_of_two: expected false, got true"),
        (("corrections=bias_tuning", "corrections.bias_tuning.learn=[bias]"), "learn: expected some of biases, "),
        (("corrections=bias_tuning", "corrections.bias_tuning.loss=ce"), "loss: expected one of kl, mse, got 'ce'"),
        (("corrections=bias_tuning", "corrections.bias_tuning.steps=0"), "steps: expected at least 1, got 0"),
        (("corrections=bias_tuning", "corrections.bias_tuning.optimizer.lr=-1"), "Invalid learning rate: -1"),
        (("corrections=network_polish", "corrections.network_polish.scale_lr=-1"), "scale_lr: expected a finite share"),
        (
            ("corrections=bias_tuning", "activation=fixed", "corrections.bias_tuning.learn=[activation_scales]"),
            "learn: expected something to tune, got a student without activation_scales",
        ),
    ],
)
def test_what_cannot_be_corrected_is_said_before_work(tmp_path: Path, chosen: tuple[str, ...], message: str) -> None:
    cfg = composed([*NOISE, *chosen], tmp_path)
    with pytest.raises(ValueError, match=message):
        run_job(cfg)
    assert set(facts_of(tmp_path)["stages"]) == {"teacher", "convert"}


NO_IMAGES = [option for option in SMALL if not option.startswith("calibration.count")]


def test_dfq_needs_no_image_at_all(tmp_path: Path) -> None:
    chosen = [*NO_IMAGES, "calibration=none", "reconstruction=none", "corrections=dfq", "activation=minmax"]
    run_job(composed(chosen, tmp_path))
    facts = facts_of(tmp_path)
    assert facts["data_free"] is True
    assert [entry["stage"] for entry in facts["real_data"]] == ["evaluation"]
    assert [len(entry) > 1 for entry in facts["corrections"]] == [True] * 3


@pytest.mark.parametrize("name", ["bias_tuning", "light"])
def test_corrections_that_measure_images_are_refused_without_any_before_work(tmp_path: Path, name: str) -> None:
    chosen = [*NO_IMAGES, "calibration=none", "reconstruction=none", f"corrections={name}"]
    with pytest.raises(ValueError, match=r"corrections: expected none that needs images with calibration=none"):
        run_job(composed(chosen, tmp_path))
    assert facts_of(tmp_path)["stages"] == {}
