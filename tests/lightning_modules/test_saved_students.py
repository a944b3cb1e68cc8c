"""A run's student loads bitwise without the teacher's weights; folders that hold none are refused with a reason."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import nn

from deployment.exports import OnnxExport
from deployment.student_file import load_student
from lightning_modules.deployed import export_saved, measure_saved
from lightning_modules.run_folders import GROUPS
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
    assert saved.facts == json.loads((folder / "record.json").read_text())
    assert saved.metadata["config_hash"] == saved.facts["config_hash"] != ""
    assert (saved.mean, saved.std) == ((0.286,), (0.353,))


def test_widths_that_a_search_found_are_those_of_the_file(tmp_path: Path) -> None:
    found = ["allocation=integer_program", "allocation.budget.average_bits=5", "reconstruction=none"]
    run_job(composed([*SMALL, "calibration=noise", *found], tmp_path))
    saved = load_student_from(tmp_path)
    widths = {name: layer.weight_quantizer.grid.bits for name, layer in quantized_layers(saved.network)}
    stated = yaml.safe_load((tmp_path / "allocation.yaml").read_text())["bits"]
    assert {name: pair[0] for name, pair in stated.items()}.items() <= widths.items()
    assert len({pair[0] for pair in stated.values()}) > 1
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


def copied(folder: Path, tmp_path: Path, **files: bytes | None) -> Path:
    """The run's folder with other contents in some of its files; None: without it."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name, content in files.items():
        path = copy / NAMES[name]
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    return copy


def edited(folder: Path, key: str, value: Any) -> bytes:
    """The configuration with another value, or without the key."""
    content = yaml.safe_load((folder / NAMES["config"]).read_text())
    *above, last = key.split(".")
    group = content
    for name in above:
        group = group[name]
    if value is None:
        del group[last]
    else:
        group[last] = value
    return yaml.safe_dump(content).encode()


BINARY = bytes(range(128, 256))
NAMES = {"config": ".hydra/config.yaml", "record": "record.json", "allocation": "allocation.yaml"}
CORRUPT = {
    "config is no yaml": ("config", b"a: [1", "config.yaml, which is corrupt"),
    "config is binary": ("config", BINARY, "config.yaml, which is corrupt"),
    "config is empty": ("config", b"", "config.yaml is no configuration of a run: .* model, protocol, weight"),
    "config is a list": ("config", b"[1]", "config.yaml is no configuration of a run"),
    "config is a word": ("config", b"word", "config.yaml"),
    "config has itself in it": ("config", b"model: &a {b: *a}", "config.yaml"),
    "config has an open interpolation": ("config", b"model: ${", "config.yaml"),
    "allocation is no yaml": ("allocation", b"a: [1", "allocation.yaml, which is corrupt"),
    "allocation is binary": ("allocation", BINARY, "allocation.yaml, which is corrupt"),
    "allocation has no widths": ("allocation", b"bits: 4", "allocation.yaml"),
    "record is no json": ("record", b"{", "record.json is corrupt"),
    "record is binary": ("record", BINARY, "record.json is corrupt"),
    "record is a list": ("record", b"[1]", r"expected facts by name in .*record\.json, got \[1\]"),
    "record is too deep": ("record", b"[" * 100_000, "record.json is corrupt"),
    "teacher in the record is a word": (
        "record",
        b'{"teacher": "resnet"}',
        "expected name and weights_hash of the teacher",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_named_with_a_remedy(case: str, folder: Path, tmp_path: Path) -> None:
    name, content, message = CORRUPT[case]
    with pytest.raises(ValueError, match=message) as raised:
        load_student_from(copied(folder, tmp_path, **{name: content}))
    assert NAMES[name] in str(raised.value)
    assert "\n" not in str(raised.value)


OTHER = {
    **{f"without {group}": (group, None, rf"got none of {group};") for group in GROUPS},
    "weight is a number": ("weight", 4, "got none of weight;"),
    "a method of a newer version": (
        "weight._target_",
        "quantizers.to_come.New",
        "to_come.New', .* --upgrade",
    ),
    "a class of a newer version": (
        "weight._target_",
        "quantizers.nearest.New",
        "nearest.New', .* --upgrade",
    ),
    "a key of the protocol": ("protocol.to_come", 1, "config.yaml, of which no student .*to_come.* --upgrade"),
    "a key of the network": ("model.to_come", 1, "config.yaml, of which no student .*to_come.* --upgrade"),
    "a key of the weights": ("weight.to_come", 1, "config.yaml, of which no student .*to_come.* --upgrade"),
    "a protocol that is none": ("protocol", {"name": "brecq"}, "config.yaml, of which no student .* --upgrade"),
    "widths that are words": ("bits.weight", "four", "config.yaml: bits.weight: expected an integer .*'four'"),
    "an interpolation to nothing": ("bits.weight", "${nowhere}", "config.yaml: bits cannot be resolved"),
}


@pytest.mark.parametrize("case", OTHER)
def test_configurations_of_no_student_are_named_with_a_remedy(case: str, folder: Path, tmp_path: Path) -> None:
    key, value, message = OTHER[case]
    with pytest.raises(ValueError, match=message):
        load_student_from(copied(folder, tmp_path, config=edited(folder, key, value)))


def test_a_student_of_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run_job(composed([*QUICK, "model.seed=1", "corrections=[outlier_splitting,bias_correction]"], other))
    facts, theirs = (json.loads((path / "record.json").read_text())["teacher"] for path in (folder, other))
    assert facts["weights_hash"] != theirs["weights_hash"]
    copy = copied(folder, tmp_path)
    (copy / "student.safetensors").write_bytes((other / "student.safetensors").read_bytes())
    with pytest.raises(ValueError, match=f"teacher is '{theirs['weights_hash']}' in .*, but '{facts['weights_hash']}'"):
        load_student_from(copy)
    (copy / "record.json").write_text(json.dumps({"teacher": {"name": "tiny"}}))
    load_student_from(copy)  # a record that says nothing of it forbids nothing


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
