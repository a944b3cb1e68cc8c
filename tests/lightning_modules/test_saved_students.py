"""A run's student loads bitwise without the teacher's weights; folders that hold none are refused with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from deployment.exports import OnnxExport
from deployment.student_file import load_student
from lightning_modules.deployed import export_saved, measure_saved
from lightning_modules.saved_students import load_student_from
from quantizers.layer import quantized_layers
from run import run_job
from tests.configuration import ROOT, SMALL, composed

QUICK = [*SMALL, "calibration=noise", "bits=w3a3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_job(composed([*QUICK, "corrections=[outlier_splitting,bias_correction]"], folder))
    return folder


def original(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The student that the run itself scored."""
    seen = []
    monkeypatch.setattr("run.load_student", lambda student, *rest: (load_student(student, *rest), seen.append(student)))
    run_job(composed([*SMALL, f"evaluate={folder}"], folder.parent / "again"))
    return seen[0]


def test_outputs_are_bitwise_those_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = original(folder, monkeypatch)
    monkeypatch.setattr("networks.teachers.read_checkpoint", None)  # no weights are read
    monkeypatch.setattr("quantizers.calibrate.calibrate_ranges", None)
    saved = load_student_from(folder)
    images = torch.randn(5, *saved.input_size)
    with torch.no_grad():
        assert torch.equal(saved.network(images), expected.cpu().eval()(images))
    assert saved.metadata["protocol"] == "brecq"
    assert saved.metadata["data_free"] == "true"
    assert saved.metadata["teacher"].startswith("tiny ")
    assert saved.facts["metrics"]["test/quantized/top1"] >= 0
    assert (saved.mean, saved.std) == ((0.286,), (0.353,))


def test_widths_that_a_search_found_are_those_of_the_file(tmp_path: Path) -> None:
    found = ["allocation=integer_program", "allocation.budget.average_bits=5", "reconstruction=none"]
    run_job(composed([*SMALL, "calibration=noise", *found], tmp_path))
    saved = load_student_from(tmp_path)
    widths = {layer.weight_quantizer.grid.bits for _, layer in quantized_layers(saved.network)}
    assert len(widths) > 1
    rows = json.loads((tmp_path / "record.json").read_text())["metrics"]
    assert rows["test/quantized/top1"] >= 0
    exported = export_saved(tmp_path, OnnxExport(compared=2))
    assert exported[0].exists()


def test_a_checkpoint_is_not_needed(tmp_path: Path, folder: Path) -> None:
    moved = tmp_path / "moved"
    (moved / ".hydra").mkdir(parents=True)
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    cfg.model.checkpoint = "/nowhere/weights.pth"
    OmegaConf.save(cfg, moved / ".hydra" / "config.yaml")
    (moved / "student.safetensors").write_bytes((folder / "student.safetensors").read_bytes())
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(load_student_from(moved).network(images), load_student_from(folder).network(images))


def test_what_is_no_run_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected the folder of an earlier run, with \.hydra/config\.yaml"):
        load_student_from(tmp_path)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match="is no configuration of a run"):
        load_student_from(tmp_path)
    (tmp_path / ".hydra" / "config.yaml").write_text((folder / ".hydra" / "config.yaml").read_text())
    with pytest.raises(ValueError, match=r"student\.safetensors, which does not exist"):
        load_student_from(tmp_path)
    (tmp_path / "student.safetensors").write_bytes((folder / "student.safetensors").read_bytes())
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"record\.json is corrupt"):
        load_student_from(tmp_path)


def test_another_width_in_the_configuration_is_noticed(tmp_path: Path, folder: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    cfg = OmegaConf.load(folder / ".hydra" / "config.yaml")
    cfg.bits.weight = 4
    OmegaConf.save(cfg, tmp_path / ".hydra" / "config.yaml")
    (tmp_path / "student.safetensors").write_bytes((folder / "student.safetensors").read_bytes())
    with pytest.raises(ValueError, match="use the bits and protocol it was made with"):
        load_student_from(tmp_path)


def test_export_and_measurement_need_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    path, rows = export_saved(folder, OnnxExport(container="int4"), tmp_path / "small.onnx")
    assert path == tmp_path / "small.onnx"
    assert max(row.steps for row in rows) <= 1
    found = measure_saved(folder, rounds=1, seconds=0.01)
    assert found.bytes["quantized"] < found.bytes["float"]
    assert [row.model for row in found.models] == ["float", "quantized"]
    with pytest.raises(ValueError, match="at least 1 each, got 0 and 1"):
        measure_saved(folder, batch=0)


def test_the_readmes_example_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- library -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    lines = [line for line in found[1].splitlines() if line.strip()]
    assert len(lines) <= 10
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines).replace("outputs/<run>", str(folder)), {})
    assert (tmp_path / "model.onnx").stat().st_size > 0
