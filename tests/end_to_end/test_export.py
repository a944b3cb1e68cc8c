"""`export=onnx` as the last stage of a run: the file, what it says of itself, and what the record says of it."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from deployment.openvino_model import RuntimeProcessError
from deployment.parity import Parity, ParityError, compare
from deployment.predictions import Predictions
from lightning_modules.exporting import expect_exportable
from lightning_modules.job import open_job
from networks.teachers import Teacher, load_teacher
from run import make_student, run_job
from tests.configuration import SMALL, composed, options

PARITY_FILES = ("parity.csv", "parity_openvino.csv")
QUICK = [*SMALL, "calibration=noise", "reconstruction=none", "weight=nearest", "activation=fixed"]


def test_a_run_leaves_a_model_that_a_runtime_agrees_with(tmp_path: Path) -> None:
    metrics = run_job(composed([*QUICK, "export=onnx"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    model = onnx.load(tmp_path / "model.onnx")
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["config_hash"] == facts["config_hash"]
    assert props["protocol"] == "brecq"
    assert props["data_free"] == "true"
    assert props["teacher"] == f"tiny {facts['teacher']['weights_hash']}"
    export = facts["export"]
    assert export["bytes"] == (tmp_path / "model.onnx").stat().st_size
    assert export["worst"]["steps"] <= 1
    assert (export["file"], export["compared"], export["alike"]) == ("model.onnx", 64, 64)
    assert export["logits_off"] < 1e-6
    assert export["student_top1"] == pytest.approx(metrics["test/quantized/top1"], abs=1e-3)
    assert (export["images"], export["agreement"]) == (64, 100)
    assert "export" in facts["stages"]
    rows = list(csv.DictReader((tmp_path / "parity.csv").read_text().splitlines()))
    assert [rows[0]["tensor"], rows[-1]["tensor"]] == ["relu", "logits"]
    assert [rows[0]["layer"], rows[-1]["layer"]] == ["conv1", "linear"]


def test_a_second_runtime_has_to_agree_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(composed([*QUICK, "export=onnx", "export.openvino=true"], tmp_path / "alike"))
    export = json.loads((tmp_path / "alike" / "record.json").read_text())["export"]
    assert export["openvino"].keys() == export.keys() - {"file", "container", "bytes", "float_biases", "openvino"}
    assert (export["openvino"]["compared"], export["openvino"]["alike"]) == (64, 64)
    assert export["openvino"]["agreement"] == 100
    first, second = ((tmp_path / "alike" / name).read_text().splitlines() for name in PARITY_FILES)
    assert [row.split(",")[0] for row in first] == [row.split(",")[0] for row in second]
    run_job(composed([*QUICK, "export=onnx"], tmp_path / "alike"))
    assert [(tmp_path / "alike" / name).exists() for name in PARITY_FILES] == [True, False]
    assert "openvino" not in sys.modules  # it is not safe beside torch

    def off(*arguments: Any, **settings: Any) -> Parity:
        found = compare(*arguments, **settings)
        rows = [replace(row, steps=2.0) for row in found.rows] if found.runtime == "openvino" else found.rows
        return found._replace(rows=rows)

    monkeypatch.setattr("lightning_modules.exporting.compare", off)
    with pytest.raises(ParityError, match="same integers from openvino and student"):
        run_job(composed([*QUICK, "export=onnx", "export.openvino=true"], tmp_path / "off"))
    assert not (tmp_path / "off" / "model.onnx").exists()
    assert (tmp_path / "off" / "model.failed.onnx").exists()


@pytest.mark.parametrize(("compared", "count"), [("null", 64), ("10", 10)])
def test_as_many_images_are_compared_as_asked_for(compared: str, count: int, tmp_path: Path) -> None:
    """Also more than a batch has."""
    run_job(composed([*QUICK, "data.batch_size=8", "export=onnx", f"export.compared={compared}"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert (facts["export"]["compared"], facts["export"]["images"]) == (count, 64)


def test_a_run_fails_where_the_runtime_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_text("of an earlier run")
    monkeypatch.setattr("deployment.parity.STEPS", -1)
    with pytest.raises(
        ParityError, match=r"at relu \(layer conv1\), the first .*; the file is kept as .*model\.failed\.onnx"
    ):
        run_job(composed([*QUICK, "export=onnx"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["status"] == "failed"
    assert "relu" in facts["error"]
    assert facts["export"]["file"] == "model.failed.onnx"
    assert (tmp_path / "parity.csv").exists()
    assert (tmp_path / "student.safetensors").exists()
    assert (tmp_path / "model.onnx").read_text() == "of an earlier run"
    assert onnx.load(tmp_path / "model.failed.onnx").producer_name == "calibrant"
    monkeypatch.undo()
    run_job(composed([*QUICK, "export=onnx"], tmp_path))
    assert onnx.load(tmp_path / "model.onnx").producer_name == "calibrant"
    assert not (tmp_path / "model.failed.onnx").exists()


def test_a_tolerance_of_top1_fails_a_run_where_one_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = Predictions(images=64, top1=0.0, student_top1=90.0, rounded_top1=90.0, agreement=0.0)
    monkeypatch.setattr("lightning_modules.exporting.predictions", lambda *_, **__: {"onnxruntime": far})
    run_job(composed([*QUICK, "export=onnx"], tmp_path / "reported"))
    assert json.loads((tmp_path / "reported" / "record.json").read_text())["export"]["top1"] == 0.0
    with pytest.raises(ParityError, match=r"export\.tolerance: .* 90\.00, within 0\.1 points, got 0\.00"):
        run_job(composed([*QUICK, "export=onnx", "export.tolerance=0.1"], tmp_path / "failed"))
    assert not (tmp_path / "failed" / "model.onnx").exists()


class Untraced(nn.Module):
    """A teacher's network with a part that depends on the values of its input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if x.abs().max() > 0 else -x)


class Sorted(nn.Module):
    """A teacher's network with an operator that has no ONNX here."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).cumsum(1)


def teacher_with(*, network: str, **arguments: Any) -> Teacher:
    """The tiny teacher inside another network."""
    teacher = load_teacher(**arguments)
    return replace(teacher, network=globals()[network](teacher.network).eval().requires_grad_(False))


@pytest.mark.parametrize(
    ("network", "message"), [("Untraced", "a module that could not be traced"), ("Sorted", "cumsum, an operator")]
)
def test_what_cannot_be_written_is_found_before_any_work(network: str, message: str, tmp_path: Path) -> None:
    target = [f"model._target_={__name__}.teacher_with", f"+model.network={network}"]
    with pytest.raises(ValueError, match=message):
        run_job(composed([*SMALL, "calibration=noise", *target, "export=onnx"], tmp_path))
    assert set(json.loads((tmp_path / "record.json").read_text())["stages"]) == {"teacher", "convert"}


def test_what_the_installed_packages_lack_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 24)
    with pytest.raises(ValueError, match=r"export\.opset: expected at most 24"):
        run_job(composed([*QUICK, "export=onnx", "export.container=int2"], tmp_path / "onnx"))
    monkeypatch.undo()

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("opset 25 is under development")

    monkeypatch.setattr("lightning_modules.exporting.load", refused)
    with pytest.raises(ValueError, match=r"which it refuses \(opset 25 is under development\); choose another"):
        run_job(composed([*QUICK, "export=onnx"], tmp_path / "runtime"))

    def ended(*_: Any, **__: Any) -> None:
        raise RuntimeProcessError("its process ended")

    monkeypatch.setattr("lightning_modules.exporting.load", ended)
    with pytest.raises(RuntimeProcessError, match=r"^its process ended$"):
        run_job(composed([*QUICK, "export=onnx"], tmp_path / "ended"))
    monkeypatch.undo()
    two = ["bits=w2a4", "export=onnx", "export.container=int2"]
    with pytest.raises(ValueError, match=r"^openvino: expected a model that OpenVINO reads.*export\.openvino=false"):
        run_job(composed([*QUICK, *two, "export.openvino=true"], tmp_path / "second"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"the package openvino, .*pip install calibrant\[openvino\]"):
        run_job(composed([*QUICK, "export=onnx", "export.openvino=true"], tmp_path / "missing"))
    monkeypatch.undo()
    for name in ("onnx", "runtime", "ended", "second"):
        assert set(json.loads((tmp_path / name / "record.json").read_text())["stages"]) == {"teacher", "convert"}
    run_job(composed([*QUICK, "export=onnx", "export.compared=0"], tmp_path / "unchecked"))
    assert (tmp_path / "unchecked" / "model.onnx").exists()
    run_job(composed([*QUICK, *two], tmp_path / "two"))
    assert json.loads((tmp_path / "two" / "record.json").read_text())["export"]["alike"] == 64


@pytest.mark.parametrize("weight", options("weight"))
@pytest.mark.parametrize("activation", ["fixed", "lsq_plus"])
def test_every_fresh_student_can_be_written(weight: str, activation: str, tmp_path: Path) -> None:
    """Its roundings are still soft then, its ranges not yet chosen."""
    cfg = composed([*QUICK, f"weight={weight}", f"activation={activation}", "export=onnx"], tmp_path)
    with open_job(cfg) as job:
        teacher = instantiate(cfg.model)
        student = make_student(job, teacher, None).student
        before = {key: value.clone() for key, value in student.state_dict().items()}
        expect_exportable(job, teacher, student)
        assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_a_finished_run_is_exported_later_with_its_accuracy(tmp_path: Path) -> None:
    run_job(composed(QUICK, tmp_path / "first"))
    run_job(composed([*QUICK, f"evaluate={tmp_path / 'first'}", "export=onnx"], tmp_path / "second"))
    facts = json.loads((tmp_path / "second" / "record.json").read_text())
    assert facts["export"]["agreement"] == 100
    assert (tmp_path / "second" / "model.onnx").exists()
    assert not (tmp_path / "first" / "model.onnx").exists()


def test_what_is_exported_does_not_change_what_a_run_is_called(tmp_path: Path) -> None:
    hashes, metrics = [], []
    for export in ("none", "onnx"):
        metrics.append(run_job(composed([*QUICK, f"export={export}"], tmp_path / export)))
        hashes.append(json.loads((tmp_path / export / "record.json").read_text())["config_hash"])
    assert hashes[0] == hashes[1]
    assert metrics[0] == metrics[1]
    assert not (tmp_path / "none" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.container=int3", "expected one of auto, int8, int4, int2"),
        ("export.opset=13", r"export\.opset: expected at least 21"),
        ("export.compared=-1", r"export\.compared"),
        ("export.tolerance=-0.1", r"export\.tolerance"),
        ("export.threads=0", r"export\.threads"),
        ("export.openvino=off", r"export\.openvino: expected true or false, got 'off'"),
    ],
)
def test_mistakes_are_named_before_any_work(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        run_job(composed([*QUICK, "export=onnx", override], tmp_path))
    assert not (tmp_path / "student.safetensors").exists()


def test_openvino_compared_on_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"export\.openvino .*got export\.compared=0"):
        run_job(composed([*QUICK, "export=onnx", "export.openvino=true", "export.compared=0"], tmp_path))
