"""The console command: its words, and the main job without one."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import onnx
import pytest

import commands
from run import run_job
from tests.configuration import SMALL, composed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
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


def test_mistakes_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="calibrant export: folder: expected that of a finished run"):
        called(monkeypatch, "export", str(tmp_path))
    with pytest.raises(SystemExit):
        called(monkeypatch, "evaluate")
