"""The console command: its words, and the main job without one."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import onnx
import pytest

import commands
from run import run_job
from tests.configuration import SMALL, composed


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


def test_benchmark(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called(monkeypatch, "benchmark", str(folder), "--rounds", "1")
    assert "speedup" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "latency.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == ["float", "quantized"]
    assert (folder / "layers.csv").exists()
    assert (folder / "operators.csv").exists()


def test_evaluate_is_the_main_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("run.main", lambda: seen.append(sys.argv[1:]))
    called(monkeypatch, "evaluate", str(folder), "hydra.run.dir=x")
    called(monkeypatch, "bits=w4a4")
    called(monkeypatch)
    assert seen == [[f"evaluate={folder}", "hydra.run.dir=x"], ["bits=w4a4"], []]


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
