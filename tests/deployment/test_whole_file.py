"""Files appear whole or not at all, and a folder in the way is named before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deployment.exports import OnnxExport, failed, written_if_alike
from deployment.onnx_export import export_onnx
from deployment.parity import ParityError
from deployment.student_file import save_student
from deployment.whole_file import whole_file
from lightning_modules.deployed import export_saved
from tests.deployment.students import SIZE, net, student_of


def write_half(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("sec")
        raise OSError("disk full")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.onnx"
    with whole_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("first")
    with pytest.raises(OSError, match="disk full"):
        write_half(path)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_students_and_models_leave_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(state: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("deployment.student_file.save_file", refused)
    with pytest.raises(OSError, match="disk full"):
        save_student(nn.Linear(1, 1), tmp_path / "student.safetensors", {})
    exported = export_onnx(student_of(net()), SIZE)
    monkeypatch.setattr(Path, "replace", lambda *_: refused({}, tmp_path / "model.onnx.tmp"))
    with pytest.raises(OSError, match="disk full"):
        exported.save(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_named_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "student.safetensors"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"expected the name of a file, got .*student\.safetensors, which is a folder"):
        save_student(nn.Linear(1, 1), folder, {})
    with pytest.raises(ValueError, match="which is a folder"):
        export_onnx(student_of(net()), SIZE).save(folder)
    with pytest.raises(ValueError, match="which is a folder"):
        export_saved(tmp_path, OnnxExport(), folder)  # before the run's own files are looked for
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_model_that_is_computed_otherwise_is_kept_apart(tmp_path: Path) -> None:
    exported, path = export_onnx(student_of(net()), SIZE), tmp_path / "small.onnx"
    path.write_text("verified")
    message = r"relu is off; the file is kept as .*small\.failed\.onnx, not as small\.onnx"
    with pytest.raises(ParityError, match=message), written_if_alike(exported, path):
        raise ParityError("relu is off")
    assert (path.read_text(), failed(path).read_bytes()) == ("verified", exported.model.SerializeToString())
    with written_if_alike(exported, path):
        assert path.read_text() == "verified"
    assert path.read_bytes() == exported.model.SerializeToString()
    assert list(tmp_path.iterdir()) == [path]


def test_noise_has_no_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"export\.compared: expected a number of noise images"):
        export_saved(tmp_path, OnnxExport(compared=None))


def test_a_saved_student_that_is_computed_otherwise_does_not_replace_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_of(net())
    loaded = type("Saved", (), {"network": student, "input_size": SIZE, "metadata": {}})
    monkeypatch.setattr("lightning_modules.deployed.load_student_from", lambda _: loaded)
    path, rows = export_saved(tmp_path, OnnxExport(compared=20))
    assert path == tmp_path / "model.onnx"
    assert rows[-1].elements == 20 * 5
    before = path.read_bytes()
    with torch.no_grad():
        student.a.bias.add_(1)
    monkeypatch.setattr("deployment.parity.STEPS", -1)
    with pytest.raises(ParityError, match=r"model\.failed\.onnx"):
        export_saved(tmp_path, OnnxExport(compared=20))
    assert path.read_bytes() == before
    assert failed(path).read_bytes() != before
