"""`export=onnx` as the last stage of a run: the file, what it says of itself, and what the record says of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import onnx
import pytest

from deployment.parity import ParityError
from run import run_job
from tests.configuration import SMALL, composed

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
    assert export["student_top1"] == pytest.approx(metrics["test/quantized/top1"], abs=1e-3)
    assert (export["images"], export["agreement"]) == (64, 100)
    assert "export" in facts["stages"]
    rows = list(csv.DictReader((tmp_path / "parity.csv").read_text().splitlines()))
    assert [rows[0]["tensor"], rows[-1]["tensor"]] == ["relu", "logits"]


def test_a_run_fails_where_the_runtime_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployment.parity.STEPS", -1)
    with pytest.raises(ParityError, match="at relu, the first tensor that differs"):
        run_job(composed([*QUICK, "export=onnx"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["status"] == "failed"
    assert "relu" in facts["error"]
    assert (tmp_path / "parity.csv").exists()
    assert (tmp_path / "student.safetensors").exists()


def test_a_finished_run_is_exported_later_with_its_accuracy(tmp_path: Path) -> None:
    run_job(composed(QUICK, tmp_path / "first"))
    run_job(composed([*QUICK, f"evaluate={tmp_path / 'first'}", "export=onnx"], tmp_path / "second"))
    facts = json.loads((tmp_path / "second" / "record.json").read_text())
    assert facts["export"]["agreement"] == 100
    assert (tmp_path / "second" / "model.onnx").exists()
    assert not (tmp_path / "first" / "model.onnx").exists()


def test_what_is_exported_does_not_change_what_a_run_is_called(tmp_path: Path) -> None:
    hashes = []
    for export in ("none", "onnx"):
        run_job(composed([*QUICK, f"export={export}"], tmp_path / export))
        hashes.append(json.loads((tmp_path / export / "record.json").read_text())["config_hash"])
    assert hashes[0] == hashes[1]
    assert not (tmp_path / "none" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.container=int3", "expected one of auto, int8, int4, int2"),
        ("export.opset=13", r"export\.opset: expected at least 21"),
        ("export.compared=-1", r"export\.compared"),
        ("export.tolerance=-0.1", r"export\.tolerance"),
        ("export.threads=0", r"export\.threads"),
    ],
)
def test_mistakes_are_named_before_any_work(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        run_job(composed([*QUICK, "export=onnx", override], tmp_path))
    assert not (tmp_path / "student.safetensors").exists()
