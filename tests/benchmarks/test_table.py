"""Results files: rows of finished runs, what they changed, and what is replaced when it is measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.table import changes, collect, merge

ROW = {"network": "n", "seed": 0, "config_hash": "a", "top1": 90.0}


def test_changes_are_settings_inside_options_but_not_places() -> None:
    found = changes(
        ["bits=w4a4", "generator.sda=false", "paths.store=x", "seed=1", "generator.lse=true", "show.units=false"]
    )
    assert found == "generator.lse=true generator.sda=false"


def test_finished_runs_are_collected_and_others_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, facts in {
        "0": {"status": "finished", "row": ROW, "overrides": ["generator.steps=5"]},
        "1": {"status": "failed", "error": "ValueError: no"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(facts))
    assert collect(tmp_path) == [ROW | {"changes": "generator.steps=5"}]
    assert "left out: 1: ValueError: no" in capsys.readouterr().err


def test_measuring_again_replaces_a_row_and_new_columns_stay_empty_in_old_ones() -> None:
    old = [{key: str(value) for key, value in ROW.items()}, {**ROW, "seed": "1"}]
    merged = merge(old, [ROW | {"top1": 91.0, "changes": "x"}])
    assert [(row["seed"], row["top1"], row["changes"]) for row in merged] == [("1", 90.0, ""), (0, 91.0, "x")]
