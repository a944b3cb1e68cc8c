"""The console command: its words, and the main job without one."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from omegaconf import OmegaConf

import commands
from deployment.exports import OnnxExport
from deployment.openvino_model import RuntimeProcessError
from deployment.parity import Parity, TensorParity
from lightning_modules.deployed import export_saved, measure_saved
from run import run_job
from tests.configuration import ROOT, SMALL, composed
from tests.lightning_modules.canaries import pickled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_job(composed([*SMALL, "calibration=noise", "reconstruction=none", "protocol=onnxruntime"], folder))
    return folder


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrant", *words])
    commands.main()


def test_export(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called(monkeypatch, "export", str(folder), "--container", "int8")
    assert "of the student" in " ".join(capsys.readouterr().out.split())
    props = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    assert (props["container"], props["protocol"]) == ("int8", "onnxruntime")


def test_export_compared_in_both_runtimes(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = OnnxExport(compared=4, openvino=True)
    path, rows = export_saved(folder, chosen, tmp_path / "model.onnx")
    assert path.exists()
    assert [row.tensor for row in rows].count("logits") == 2
    seen = []
    monkeypatch.setattr("commands.export_saved", lambda *given: seen.append(given) or (path, rows))
    called(monkeypatch, "export", str(folder), "--openvino", "--compared", "4")
    assert seen == [(folder, chosen, None)]


@pytest.mark.parametrize(("command", "function"), [("export", "export_saved"), ("benchmark", "measure_saved")])
def test_a_runtime_whose_process_ends_is_no_matter_of_files(
    command: str, function: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any, **__: Any) -> None:
        raise RuntimeProcessError("openvino: expected its process to answer")

    monkeypatch.setattr(f"commands.{function}", ended)
    with pytest.raises(SystemExit, match=rf"^calibrant {command}: openvino: expected its process to answer$"):
        called(monkeypatch, command, str(folder))


def test_benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called(monkeypatch, "benchmark", str(folder), "--rounds", "1")
    assert "speedup" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "latency.csv").read_text().splitlines()))
    assert [(row["runtime"], row["model"]) for row in rows] == [("onnxruntime", "float"), ("onnxruntime", "quantized")]
    assert (folder / "layers.csv").exists()
    assert (folder / "operators.csv").exists()


def test_benchmark_in_both_runtimes(folder: Path) -> None:
    found = measure_saved(folder, rounds=1, seconds=0.01, layers=False, openvino=True).models
    assert [(row.runtime, row.model) for row in found] == [
        ("onnxruntime", "float"), ("onnxruntime", "quantized"), ("openvino", "float"), ("openvino", "quantized"),
    ]  # fmt: skip


def test_evaluate_is_the_main_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("run.main", lambda: seen.append(sys.argv[1:]))
    called(monkeypatch, "evaluate", str(folder), "hydra.run.dir=x")
    called(monkeypatch, "bits=w4a4")
    called(monkeypatch)
    assert seen == [[f"evaluate={folder}", "hydra.run.dir=x"], ["bits=w4a4"], []]


def test_evaluate_scores_the_saved_student_again(folder: Path, tmp_path: Path) -> None:
    def files() -> dict[
        Path, bytes
    ]:  # but for the store, which keeps the float network's answers for each number of threads
        paths = (path for path in folder.rglob("*") if path.is_file() and "store" not in path.parts)
        return {path: path.read_bytes() for path in paths}

    before = files()
    line = [sys.executable, "-W", "ignore", "-m", "commands", "evaluate"]
    words = [str(folder), f"hydra.run.dir={tmp_path / 'again'}"]
    done = subprocess.run([*line, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again, first = (json.loads((path / "record.json").read_text()) for path in (tmp_path / "again", folder))
    assert again["metrics"] == {key: value for key, value in first["metrics"].items() if key in again["metrics"]}
    assert {"test/float/top1", "test/quantized/top1", "test/quantized/loss"} <= again["metrics"].keys()
    assert "reconstruction" not in again["stages"]
    assert "images" not in again["stages"]
    assert files() == before
    done = subprocess.run([*line, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "evaluate: expected the folder of an earlier run" in done.stderr


def test_report_verify_and_compare(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called(monkeypatch, "report", str(folder.parent))
    assert (folder.parent / "report.html").exists()
    called(monkeypatch, "verify", str(folder / "record.json"), "--output", str(folder.parent / "again"))
    assert "every metric is equal, bitwise" in capsys.readouterr().out
    called(monkeypatch, "compare", str(folder), str(folder.parent / "again"))
    assert "test/quantized/top1" in capsys.readouterr().out


def test_verify_fails_where_a_metric_differs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((folder / "record.json").read_text())
    facts["metrics"]["test/quantized/loss"] += 1e-12
    (tmp_path / "record.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit) as raised:
        called(monkeypatch, "verify", str(tmp_path / "record.json"))
    assert raised.value.code == 1
    assert "metrics differ, with the same versions" in capsys.readouterr().out


def test_mistakes_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="calibrant export: folder: expected the folder of an earlier run"):
        called(monkeypatch, "export", str(tmp_path))
    with pytest.raises(SystemExit, match="calibrant report: folder: expected that of a sweep"):
        called(monkeypatch, "report", str(tmp_path))
    with pytest.raises(SystemExit, match="calibrant verify: record: expected"):
        called(monkeypatch, "verify", str(tmp_path))
    with pytest.raises(SystemExit):
        called(monkeypatch, "evaluate")


def message(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The one line in which a command ends that fails; the exit status of such a text is 1."""
    with pytest.raises(SystemExit) as raised:
        called(monkeypatch, *words)
    assert isinstance(raised.value.code, str)
    assert "\n" not in raised.value.code
    return raised.value.code


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_an_opset_that_is_unknown(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = onnx.defs.onnx_opset_version()
    said = message(monkeypatch, "export", str(copy), "--opset", "99")
    assert said.startswith(f"calibrant export: --opset: expected at most {newest}, ")
    assert "got 99; leave it out" in said
    assert "at least 21" in message(monkeypatch, "export", str(copy), "--opset", "7")


def test_an_output_that_cannot_be_written(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "model.onnx"
    said = message(monkeypatch, "export", str(copy), "--compared", "0", "--output", str(output))
    assert said.startswith(f"calibrant export: --output: expected a file that can be written, got {output} (")
    assert "name one in a folder where you may write" in said
    said = message(monkeypatch, "export", str(copy), "--compared", "0", "--output", str(tmp_path))
    assert said == (
        f"calibrant export: output: expected the name of a file, got {tmp_path}, which is a folder; name a file in it"
    )
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("content", [b"no model", bytes(range(256))])
def test_a_corrupt_model_is_not_measured(content: bytes, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "model.onnx").write_bytes(content)
    said = message(monkeypatch, "benchmark", str(copy), "--rounds", "1")
    assert said.startswith(f"calibrant benchmark: folder: {copy / 'model.onnx'} is refused by onnxruntime (")
    assert said.endswith(f"write it anew: calibrant export {copy}")


def test_a_model_that_is_not_the_student_ends_in_one_line(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Parity([TensorParity(tensor="relu", layer="stem", elements=10, steps=7.0, share=0.5)], images=1, alike=1)
    monkeypatch.setattr("lightning_modules.deployed.compare", lambda *_, **__: found)
    said = message(monkeypatch, "export", str(copy))
    assert said.startswith(
        "calibrant export: export: expected the same integers from onnxruntime and student up to ties"
    )
    assert "got them 7 steps apart, where 1 is a tie, at relu (layer stem)" in said
    assert said.endswith(f"the file is kept as {copy / 'model.failed.onnx'}, not as model.onnx")


def test_a_table_that_cannot_be_written(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "latency.csv").unlink(missing_ok=True)
    (copy / "latency.csv").mkdir()
    said = message(monkeypatch, "benchmark", str(copy), "--rounds", "1")
    assert said.startswith(f"calibrant benchmark: folder: cannot read or write {copy / 'latency.'}")
    assert said.endswith("check that you may, and that the disk has room")


def test_the_code_of_others_is_refused_in_one_line(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = {"_target_": "torch.load", "f": str(pickled(tmp_path / "evil", tmp_path / "sign")), "weights_only": False}
    cfg = OmegaConf.load(copy / ".hydra" / "config.yaml")
    cfg.protocol = evil
    OmegaConf.save(cfg, copy / ".hydra" / "config.yaml")
    facts = json.loads((copy / "record.json").read_text())
    facts["config"]["protocol"] = evil
    (copy / "record.json").write_text(json.dumps(facts))
    for word in ("export", "benchmark", "verify"):
        assert "protocol._target_ names 'torch.load'" in message(monkeypatch, word, str(copy))
    assert not (tmp_path / "sign").exists()
