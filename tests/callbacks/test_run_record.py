"""The run's record: complete after each stage, also when the run fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from callbacks.run_record import RunRecord, digest


def test_seconds_and_memory_of_each_stage(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {"seed": 0})
    with record.stage("images"):
        time.sleep(0.05)
    stages = json.loads((tmp_path / "record.json").read_text())["stages"]
    assert 0.05 <= stages["images"]["seconds"] < 5
    assert stages["images"]["peak_mib"] > 10


def test_written_when_a_stage_fails(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {})
    with pytest.raises(RuntimeError, match="boom"), record.stage("reconstruct"):
        raise RuntimeError("boom")
    assert "reconstruct" in json.loads((tmp_path / "record.json").read_text())["stages"]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]  # no temporary file is left


def test_digest_ignores_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
